"""`lockkit card`: results of verify and attack in the cards of a lock and of its export."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from test_attack import SMALL

from lockkit.attack.config import audit_config
from lockkit.attack.run import run_audit
from lockkit.export import check_manifest, export_model
from lockkit.verify import VerifyConfig, verify_export

TEXT = {"tokens": 128, "block_tokens": 64, "prompts": 1, "new_tokens": 4}


@pytest.fixture(scope="module")
def results(originals, locks, tmp_path_factory):
    """An export of a lock, its verification, and a small audit of the lock."""
    out = tmp_path_factory.mktemp("results")
    export_model(str(locks("llama")), out / "onnx")
    verified = verify_export(out / "onnx", [str(originals("llama")), str(locks("llama"))], VerifyConfig(**TEXT))
    verified.write(out / "verify.json")
    config = audit_config("quick", **SMALL | {"held_out_tokens": 128, "evaluation_tokens": 128})
    run_audit(str(locks("llama")), str(originals("llama")), out / "audit", config, ["full-ft", "stack-solve"])
    return out


@pytest.fixture
def folders(results, locks, tmp_path):
    """Copies of the lock and of its export, by name."""
    return {
        "locked": shutil.copytree(locks("llama"), tmp_path / "locked"),
        "onnx": shutil.copytree(results / "onnx", tmp_path / "onnx"),
    }


def index_of(folder) -> dict[str, float]:
    """The entries of `model-index` in a card: values by metric name."""
    data = ModelCard.load(folder / "README.md").data
    assert data.model_name
    return {entry.metric_name: entry.metric_value for entry in data.eval_results}


@pytest.mark.parametrize("name", ["locked", "onnx"])
def test_figures_of_verify_and_audit_are_written_into_both_cards(name, cli, folders, results):
    folder = folders[name]
    done = cli("card", folder, "--verify", results / "verify.json", "--audit", results / "audit")
    assert done.code == 0, done.err
    text = ModelCard.load(folder / "README.md").text
    verify = json.loads((results / "verify.json").read_text())
    summary = json.loads((results / "audit" / "summary.json").read_text())
    assert "Not measured" not in text
    assert f"{verify['perplexity']['onnx']:.3f}" in text
    assert all(f"{row['kl_divergence']:.1e}" in text for row in verify["parity"])
    found = {key: value for figures in summary["tasks"].values() for key, value in figures["amplification"].items()}
    assert found["tokens"]["says"] in text and summary["budget"] in text
    assert f"**{summary['verdict']['sentence']}**" in text
    index = index_of(folder)
    measured = {"onnx": verify["perplexity"]["onnx"], "locked": verify["perplexity"]["locked"]}[name]
    assert index["perplexity (lockkit verify)"] == pytest.approx(measured, rel=1e-5)
    assert any(metric.endswith("tokens (lockkit attack)") for metric in index)
    if name == "onnx":
        check_manifest(folder)


def test_a_second_call_replaces_figures_and_keeps_what_the_owner_wrote(cli, folders, results):
    folder = folders["onnx"]
    card = ModelCard.load(folder / "README.md")
    card.text = card.text.replace("## How to run it", "My words.\n\n## How to run it")
    card.data.license = "mit"
    card.save(folder / "README.md")
    for _ in range(2):
        assert cli("card", folder, "--verify", results / "verify.json").code == 0
    once = (folder / "README.md").read_text()
    assert cli("card", folder, "--audit", results / "audit" / "summary.json").code == 0
    text = (folder / "README.md").read_text()
    assert once.count("## Verification") == text.count("## Verification") == 1
    assert text.count("## What this lock is worth") == 1
    assert "My words." in text and "license: mit" in text
    metrics = [entry.metric_name for entry in ModelCard.load(folder / "README.md").data.eval_results]
    assert len(metrics) == len(set(metrics)) and "perplexity (lockkit verify)" in metrics


def test_a_missing_card_is_written_first(cli, folders):
    for folder in folders.values():
        (folder / "README.md").unlink()
        assert cli("card", folder).code == 0
        assert ModelCard.load(folder / "README.md").data.pipeline_tag == "text-generation"
    assert index_of(folders["locked"])["perplexity (lockkit lock)"] > 0


def test_results_of_another_model_are_refused(cli, folders, results, originals, tmp_path):
    export_model(str(originals("llama")), tmp_path / "original-onnx")
    with (folders["locked"] / "model.safetensors").open("ab") as weights:
        weights.write(b"another model")
    for folder in (tmp_path / "original-onnx", folders["locked"]):
        before = (folder / "README.md").read_bytes()
        for option, file in (("--verify", results / "verify.json"), ("--audit", results / "audit")):
            done = cli("card", folder, option, file)
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert " not " in done.err and f"change {option}" in done.err
        assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize("option", ["--verify", "--audit"])
@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema": "lockkit-attack-summary/2", "identity": 3}'])
def test_broken_results_are_refused_in_one_line(option, content, cli, folders, tmp_path):
    (tmp_path / "broken.json").write_text(content)
    done = cli("card", folders["locked"], option, tmp_path / "broken.json")
    assert (done.code, done.err.count("\n")) == (2, 1) and f"change {option}" in done.err


def test_folders_and_cards_that_cannot_be_used_are_refused(cli, folders, originals, tmp_path):
    for folder in (originals("llama"), tmp_path, tmp_path / "nowhere"):
        done = cli("card", folder)
        assert (done.code, done.err.count("\n")) == (2, 1) and "change FOLDER" in done.err
    (folders["onnx"] / "README.md").write_text("---\na: [\n---\n")
    done = cli("card", folders["onnx"])
    assert (done.code, done.err.count("\n")) == (2, 1) and "mend its YAML" in done.err


def test_figures_of_other_weights_than_those_in_the_folder_are_refused(cli, folders, results):
    """Weights that were replaced after the manifest or lockkit.json was written."""
    record = json.loads((folders["locked"] / "lockkit.json").read_text())
    (folders["locked"] / "lockkit.json").write_text(json.dumps(record | {"weights_sha256": "0" * 64}))
    data = bytearray((folders["onnx"] / "model.onnx_data").read_bytes())
    data[-1] ^= 1
    (folders["onnx"] / "model.onnx_data").write_bytes(data)
    for folder, named in ((folders["locked"], "lockkit.json"), (folders["onnx"], "model.onnx_data")):
        before = (folder / "README.md").read_bytes()
        for arguments in ((), ("--verify", results / "verify.json")):
            done = cli("card", folder, *arguments)
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert named in done.err and "SHA-256" in done.err and "change FOLDER" in done.err
        assert (folder / "README.md").read_bytes() == before
    done = cli("push", folders["locked"], "owner/name", "--dry-run")
    assert (done.code, done.err.count("\n")) == (2, 1) and "SHA-256" in done.err


def test_an_audit_against_another_original_is_refused(cli, folders, results, tmp_path):
    summary = json.loads((results / "audit" / "summary.json").read_text())
    summary["identity"]["original_sha256"] = "0" * 64
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    done = cli("card", folders["locked"], "--audit", tmp_path / "summary.json")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "compares this lock with other weights than those of llama" in done.err and "change --audit" in done.err
