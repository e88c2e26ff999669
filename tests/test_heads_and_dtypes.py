"""A head that differs from the embeddings, and weights whose dtype only the files say: from a folder to its lock."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import QUICK
from safetensors.torch import load_file
from test_checkpoints import (
    EMBEDDINGS,
    HEAD,
    INDEX,
    Layout,
    change_config,
    change_weights,
    read_by_transformers,
    read_in_layers,
    require_equal,
)
from tiny import save_tiny

from lockkit.export.config import ExportConfig
from lockkit.export.run import export_model
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models.checkpoint import stored_dtype
from lockkit.models.load import load_config, load_model
from lockkit.verify import VerifyConfig, verify_export

FAST_LOCK = QUICK | {"tokens": 2_048, "end_to_end_tokens": 0, "batch_tokens": 256, "validation_tokens": 256}


@pytest.fixture(scope="module")
def trained_head(tmp_path_factory):
    """A function from a model type to a model whose configuration ties a head that is in the weights and differs."""

    @functools.cache
    def make(model_type: str) -> Path:
        folder = save_tiny(model_type, tmp_path_factory.mktemp(model_type) / "model", tie_word_embeddings=False)
        change_config(folder, tie_word_embeddings=True)
        return folder

    return make


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_head_of_its_own_is_kept_from_lock_to_verify(model_type, trained_head, tmp_path):
    original = trained_head(model_type)
    lock_model(str(original), tmp_path / "locked", LockConfig(**FAST_LOCK))
    config = json.loads((tmp_path / "locked" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    stored, locked = load_file(original / "model.safetensors"), load_file(tmp_path / "locked" / "model.safetensors")
    for name in (HEAD, EMBEDDINGS):
        assert torch.equal(locked[name], stored[name])
    assert not torch.equal(stored[HEAD], stored[EMBEDDINGS])
    for source in (tmp_path / "locked", original):
        export_model(str(source), tmp_path / "onnx", ExportConfig(), overwrite=True)
        assert json.loads((tmp_path / "onnx" / "config.json").read_text())["tie_word_embeddings"] is False
        settings = VerifyConfig(tokens=512, block_tokens=64, prompts=1, new_tokens=4)
        assert verify_export(tmp_path / "onnx", [str(source)], settings).passed


def test_an_identical_second_head_stays_tied(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    change_weights(folder, {HEAD: weights[EMBEDDINGS].clone()})
    lock_model(str(folder), tmp_path / "locked", LockConfig(**FAST_LOCK))
    assert json.loads((tmp_path / "locked" / "config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in load_file(tmp_path / "locked" / "model.safetensors")


def test_a_locked_models_own_head_is_kept(locks, tmp_path):
    folder = shutil.copytree(locks("gemma2"), tmp_path / "locked")
    head = torch.randn(load_file(folder / "model.safetensors")[EMBEDDINGS].shape, generator=torch.Generator())
    change_weights(folder, {HEAD: head})
    model, _ = load_model(folder, torch.float32)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    require_equal(model.state_dict(), expected.state_dict())
    require_equal(read_in_layers(folder, torch.float32), expected.state_dict())
    assert torch.equal(model.lm_head.weight, head) and model.config.tie_word_embeddings is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lock_has_the_dtype_of_the_stored_weights(dtype, tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    wanted = getattr(torch, dtype)
    change_weights(folder, {k: v.to(wanted) for k, v in load_file(folder / "model.safetensors").items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    assert load_model(folder)[0].dtype == wanted
    lock_model(str(folder), tmp_path / "locked", LockConfig(**FAST_LOCK))
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "locked")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert {value.dtype for value in load_file(tmp_path / "locked" / "model.safetensors").values()} == {wanted}
    assert json.loads((tmp_path / "locked" / "config.json").read_text())["dtype"] == dtype


def test_the_index_may_say_the_dtype_as_in_transformers(tmp_path):
    folder = Layout(single=None, shards=0, index="plain", dtype=None).write(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": {"dtype": "float16"}}))
    expected = read_by_transformers(folder, "auto")
    assert {value.dtype for value in expected.values()} == {torch.float16}
    assert stored_dtype(folder, load_config(folder)) == torch.float16
    require_equal(load_model(folder)[0].state_dict(), expected)
