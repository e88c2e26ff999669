"""Weights out of a published export: equal to those that went in, and to what the graph computes."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch
from test_export import save_random_lock, save_tiny, sizes
from tiny import VOCAB

from lockkit.attack.recover_onnx import recover_onnx
from lockkit.errors import UsageError
from lockkit.export import ExportConfig, ExportSession, export_model
from lockkit.export.manifest import ALL_LOGITS_FILE
from lockkit.files import EXPORT_MANIFEST
from lockkit.models.families import FAMILIES
from lockkit.models.load import load_model

PRECISIONS = {"fp32": "cpu", "fp16": "cpu", "bf16": "cuda", "int8": "cpu", "int4": "cpu"}
IDS = np.random.default_rng(0).integers(1, VOCAB, (2, 12))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from (model type, locked) to a model folder."""
    made = {}

    def model(model_type: str, locked: bool):
        if (model_type, locked) not in made:
            folder = tmp_path_factory.mktemp("model") / model_type
            save = save_random_lock if locked else save_tiny
            made[model_type, locked] = save(model_type, folder, **sizes(model_type))
        return made[model_type, locked]

    return model


def exported(model, tmp_path, precision: str, provider: str | None = None):
    """An export with nothing in it but what a publisher must ship."""
    out = tmp_path / precision
    export_model(str(model), out, ExportConfig(precision=precision, provider=provider or PRECISIONS[precision]))
    return out


def graph_logits(folder, tmp_path) -> np.ndarray:
    """What onnxruntime computes, with int8 products of activations turned off: the weights count here."""
    copy = tmp_path / "exact"
    shutil.copytree(folder, copy)
    graph = onnx.load(copy / ALL_LOGITS_FILE, load_external_data=False)
    for node in [*graph.graph.node, *(node for function in graph.functions for node in function.node)]:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # fp32
    (copy / ALL_LOGITS_FILE).write_bytes(graph.SerializeToString())
    return ExportSession(copy, check=False).forward(IDS)[0]


@pytest.mark.parametrize("locked", [False, True], ids=["original", "locked"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_comes_out_is_what_went_in(model_type, locked, models, tmp_path):
    source = load_model(models(model_type, locked), torch.float32)[0].state_dict()
    for precision in ("fp32", "bf16"):  # bf16 has no arithmetic on the CPU: its weights can be compared
        folder = exported(models(model_type, locked), tmp_path, precision)
        (folder / EXPORT_MANIFEST).unlink()  # not needed
        recovered = recover_onnx(folder).state_dict()
        assert recovered.keys() == source.keys()
        for name, value in source.items():
            error = 1e-6 if precision == "fp32" else 2**-7
            bound = error * (1 + value.abs().max())
            assert (recovered[name] - value).abs().max() <= bound, (precision, name)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("locked", [False, True], ids=["original", "locked"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_forward_pass_is_the_graphs_and_can_be_trained(model_type, locked, precision, models, tmp_path):
    folder = exported(models(model_type, locked), tmp_path, precision)
    model = recover_onnx(folder)
    want = graph_logits(folder, tmp_path)
    ids = torch.tensor(IDS)
    out = model(ids, labels=ids)
    error = np.abs(out.logits.detach().numpy() - want).max() / np.abs(want).max()
    print(f"{model_type} {precision}: {error:.1e}")
    assert error < (0.02 if precision == "fp16" else 1e-4)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert model(ids, labels=ids).loss < out.loss


def test_a_folder_that_is_no_export_is_refused(models, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        recover_onnx(tmp_path)
    with pytest.raises(UsageError, match=r"has no model\.onnx"):
        recover_onnx(models("llama", False))
    folder = exported(models("llama", True), tmp_path, "fp32")
    weights = folder / "model.onnx_data"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        recover_onnx(folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UsageError, match="change EXPORT"):
        recover_onnx(folder)
