"""`lockkit web`: exports in the layout of transformers.js. tests/consumers runs one in Node."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from test_export import exports, models  # noqa: F401 (fixtures)

from lockkit.export import ExportConfig, export_model
from lockkit.files import EXPORT_MANIFEST
from lockkit.models.card import read_metadata
from lockkit.targets import Precision


@pytest.fixture(scope="module")
def made(exports, models, tmp_path_factory):  # noqa: F811
    """Two exports of one lock, and the folder made of them."""
    folder = tmp_path_factory.mktemp("web")
    export_model(str(models("llama", True)), folder / "int4", ExportConfig(precision=Precision.int4, block_size=16))
    return exports("llama", True), folder / "int4"


def test_names_weights_and_answers_are_those_that_transformers_js_expects(made, cli, tmp_path):
    out = tmp_path / "web"
    done = cli("web", *made, "--out", out)
    assert done.code == 0, done.err
    graphs = {"onnx/model.onnx": made[0], "onnx/model_q4.onnx": made[1]}
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "model.onnx", "model.onnx_data", "model_q4.onnx", "model_q4.onnx_data",
    ]  # fmt: skip
    assert not (out / "genai_config.json").exists() and (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["transformers.js_config"] == {"use_external_data_format": True}
    assert read_metadata(out / "README.md")["library_name"] == "transformers.js"
    card = (out / "README.md").read_text()
    assert "| `q4` | `onnx/model_q4.onnx` |" in card and "onnxruntime_genai" not in card and "Licence" in card
    for name, export in graphs.items():
        locations = {
            entry.value
            for tensor in onnx.load(out / name, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations == {name.removeprefix("onnx/") + "_data"}
        assert np.array_equal(logits(out / name), logits(export / "model.onnx"))


def logits(graph) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph)
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    feeds |= {"position_ids": np.arange(3)[None]}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
    names = {node.name for node in session.get_inputs()}
    return session.run(["logits"], {name: value for name, value in feeds.items() if name in names})[0]


def test_push_takes_it_and_refuses_a_damaged_one(made, cli, tmp_path):
    out = tmp_path / "web"
    assert cli("web", made[0], "--out", out).code == 0
    listed = cli("push", out, "owner/name", "--dry-run")
    assert listed.code == 0 and "onnx/model.onnx_data" in listed.out, listed.err
    (out / "onnx" / "model.onnx").write_bytes(b"x")
    assert "run lockkit web again" in cli("push", out, "owner/name", "--dry-run").err


def test_what_does_not_belong_together_is_refused(made, exports, cli, tmp_path):  # noqa: F811
    out = tmp_path / "web"
    assert "different models" in cli("web", made[0], exports("llama", False), "--out", out).err
    assert "leave out one" in cli("web", made[0], made[0], "--out", out).err
    (tmp_path / "empty").mkdir()
    assert "is not an export" in cli("web", tmp_path / "empty", "--out", out).err
    cuda = shutil.copytree(made[0], tmp_path / "cuda")
    manifest = json.loads((cuda / EXPORT_MANIFEST).read_text()) | {"precision": "int8", "provider": "cuda"}
    (cuda / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    assert "another --precision" in cli("web", cuda, "--out", out).err
    assert not out.exists()
    assert cli("web", made[0], "--out", out).code == 0
    assert "add --overwrite" in cli("web", made[0], "--out", out).err
    assert cli("web", made[1], "--out", out, "--overwrite").code == 0 and not (out / "onnx" / "model.onnx").exists()
    assert "EXPORT's own folder" in cli("web", made[0], "--out", made[0] / "onnx").err
