"""The folder of an export: its files, its manifest, and what is refused."""

# ruff: noqa: F811 (parameters have the names of imported fixtures)

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_export import GAINS, ROPE, exports, models, token_ids  # noqa: F401 (fixtures)
from tiny import save_tiny

from lockkit.errors import LockkitError, UnsupportedModelError, UsageError
from lockkit.export import ExportConfig, ExportSession, check_manifest, export_model
from lockkit.export.run import check_graph
from lockkit.files import CARD, EXPORT_MANIFEST
from lockkit.models.load import TOKENIZER_FILES, load_model
from lockkit.models.save import copy_tokenizer


@pytest.fixture
def copied(exports, tmp_path):
    """A copy of an export that a test may change."""
    return Path(shutil.copytree(exports("llama", True), tmp_path / "export"))


def test_the_folder_has_the_files_that_runtimes_need(models, exports):
    source, folder = models("qwen3", True), exports("qwen3", True)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["use_cache"] is True
    assert not {"auto_map", "dlr"} & set(config)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert {"genai_config.json", "generation_config.json", "model.onnx", "model.onnx_data"} < {
        path.name for path in folder.iterdir()
    }
    graph = check_graph(folder / "model.onnx").graph
    locations = {
        entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx_data"}
    for value in [*graph.input, *graph.output]:
        if "key" in value.name or "value" in value.name:
            assert value.type.tensor_type.shape.dim[3].dim_value == 16


def test_the_graph_has_the_locked_weights_and_no_others(models, exports):
    graph = onnx.load(exports("llama", True) / "model.onnx", load_external_data=False).graph
    elements = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if "_cache" not in tensor.name)
    model, _ = load_model(models("llama", True))
    assert elements == sum(parameter.numel() for parameter in model.parameters())
    assert not [tensor.name for tensor in graph.initializer if list(tensor.dims) in ([64, 48], [48, 64])]


def test_the_manifest_describes_the_export(models, exports):
    manifest = check_manifest(exports("phi", True))
    assert (manifest.model_type, manifest.locked, manifest.depth, manifest.gains) == ("phi", True, 5, GAINS)
    assert (manifest.precision, manifest.provider, manifest.block_size) == ("fp32", "cpu", None)
    assert list(manifest.source_sha256) == ["model.safetensors"]
    assert set(manifest.files) == {path.name for path in exports("phi", True).iterdir()} - {EXPORT_MANIFEST, CARD}
    assert not check_manifest(exports("phi", False)).locked


def test_damaged_files_are_refused(copied):
    data = copied / "model.onnx_data"
    with data.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UsageError, match=r"model\.onnx_data is not the file"):
        ExportSession(copied)
    ExportSession(copied, check=False)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"model\.onnx_data has \d+ bytes"):
        check_manifest(copied)
    data.unlink()
    with pytest.raises(UsageError, match=r"model\.onnx_data is missing"):
        check_manifest(copied)
    with pytest.raises(UsageError, match="onnxruntime cannot load"):
        ExportSession(copied, check=False)


def test_an_export_in_the_cache_of_the_hubs_client_is_read(exports, cli, tmp_path):
    """There, every file is a link into the repository's folder `blobs`."""
    snapshot = tmp_path / "models--me--model" / "snapshots" / "0123abc"
    for file in exports("llama", True).iterdir():
        blob = tmp_path / "models--me--model" / "blobs" / f"blob-of-{file.name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    assert check_manifest(snapshot) == check_manifest(exports("llama", True))
    done = cli("generate", snapshot, "--prompt", "import", "--max-new-tokens", 3)
    assert done.code == 0, done.err


def test_links_out_of_the_folder_are_refused(copied, tmp_path):
    (copied / "config.json").rename(tmp_path / "elsewhere.json")
    (copied / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UsageError, match="a link out of the folder"):
        check_manifest(copied)


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "a/../../b", "C:\\b", "..\\b", "", "./x", EXPORT_MANIFEST]
)
def test_names_out_of_the_folder_are_refused(name, copied):
    path = copied / EXPORT_MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"is broken at .files"):
        check_manifest(copied)


def test_broken_manifests_are_refused(copied):
    path = copied / EXPORT_MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"schema": "lockkit-export-manifest/2"}))
    with pytest.raises(UsageError, match="schema"):
        check_manifest(copied)
    path.write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        check_manifest(copied)
    path.unlink()
    with pytest.raises(UsageError, match="not an export"):
        check_manifest(copied)
    with pytest.raises(UsageError, match="no folder"):
        check_manifest(copied / "nowhere")


def test_bad_input_of_a_session_is_refused(exports):
    session = ExportSession(exports("llama", True))
    assert session.provider == "CPUExecutionProvider"
    assert session.config["model_type"] == "llama"
    with pytest.raises(UsageError, match="context of 256"):
        session.forward(token_ids(1, 257))
    with pytest.raises(UsageError, match="attention mask"):
        session.forward(token_ids(1, 4), np.ones((1, 5), np.int64))
    _, cache = session.forward(token_ids(1, 4))
    with pytest.raises(UsageError, match="padding among new tokens"):
        session.forward(token_ids(1, 1), np.array([[1, 1, 1, 1, 0]]), cache)
    with pytest.raises(UsageError, match="provider"):
        ExportSession(exports("llama", True), provider="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--provider cpu"):
            ExportSession(exports("llama", True), provider="cuda")


def test_exports_that_cannot_work_are_refused(models, tmp_path):
    llama = str(models("llama", False))
    with pytest.raises(UsageError, match="no bf16"):
        export_model(llama, tmp_path / "out", ExportConfig(precision="bf16"))
    with pytest.raises(UsageError, match="no fp32 arithmetic on CUDA: change --precision"):
        export_model(llama, tmp_path / "out", ExportConfig(precision="fp32", provider="cuda"))
    dynamic = ROPE | {"rope_type": "dynamic", "factor": 2.0}
    save_tiny("llama", tmp_path / "dynamic", rope_parameters=dynamic)
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        export_model(str(tmp_path / "dynamic"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already: change OUT"):
        export_model(llama, tmp_path / "out")
    with pytest.raises(UsageError, match="not written by lockkit"):
        export_model(llama, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamic", "out"]


def test_a_failing_builder_writes_nothing_and_names_the_cause(models, tmp_path, monkeypatch):
    from lockkit.export import builders

    def fail(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr(builders._LockkitBuilder, "make_layer", fail)
    with pytest.raises(LockkitError, match=r"could not be built .KeyError: 'no such thing'"):
        export_model(str(models("llama", False)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "provider", "precision"),
    [
        ("bfloat16", "cpu", "int8"),
        ("bfloat16", "cuda", "bf16"),
        ("float16", "cuda", "fp16"),
        ("float32", "cpu", "fp32"),
        ("float32", "cuda", "fp16"),
    ],
)
def test_the_default_precision_is_what_the_provider_computes_well(dtype, provider, precision, models, tmp_path):
    load_model(models("qwen3", False), getattr(torch, dtype))[0].save_pretrained(tmp_path / "model")
    copy_tokenizer(models("qwen3", False), tmp_path / "model")
    result = export_model(str(tmp_path / "model"), tmp_path / "out", ExportConfig(provider=provider))
    assert result.manifest.precision == precision


def test_command(cli, models, tmp_path):
    command = ("export", models("llama", True), tmp_path / "out")
    first = cli(*command, "--precision", "int8")
    assert first.code == 0, first.err
    assert "locked llama, int8 for cpu" in first.out
    assert "Reading" not in first.out + first.err and "quantiz" not in first.out + first.err
    assert cli(*command).code == 2
    assert cli(*command, "--overwrite").code == 0
    assert check_manifest(tmp_path / "out").precision == "fp32"
    refused = cli(*command, "--overwrite", "--block-size", "24")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "--block-size" in refused.err
