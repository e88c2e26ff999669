"""`lockkit card --bom`: a bill of materials that CycloneDX's own validator accepts, with the lineage of the model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("cyclonedx", reason="pip install lockkit[sign]")

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from lockkit.export import export_model
from lockkit.files import sha256_of_file
from lockkit.models.identity import weights_sha256


@pytest.fixture(scope="module")
def source(locks, tmp_path_factory):
    """A lock with a licence, and its export."""
    folder = tmp_path_factory.mktemp("bom")
    shutil.copytree(locks("llama"), folder / "locked")
    card = (folder / "locked" / "README.md").read_text().replace("---\n", "---\nlicense: apache-2.0\n", 1)
    (folder / "locked" / "README.md").write_text(card)
    export_model(str(folder / "locked"), folder / "onnx")
    return folder


@pytest.fixture
def folders(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "bom"))


def bill(cli, folder: Path, *options: object) -> dict:
    done = cli("card", folder, "--bom", *options)
    assert done.code == 0, done.err
    text = (folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert str(folder.parent) not in text
    return json.loads(text)


def by_name(components: list[dict]) -> dict[str, dict]:
    return {component["name"]: component for component in components}


def sha256(component: dict) -> str:
    (found,) = component["hashes"]
    assert found["alg"] == "SHA-256"
    return found["content"]


def test_the_bill_of_a_lock_has_its_lineage(cli, folders, originals):
    folder = folders / "locked"
    bom, record = bill(cli, folder), json.loads((folder / "lockkit.json").read_text())
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    (original,) = model["pedigree"]["ancestors"]
    assert (original["name"], sha256(original)) == ("llama", weights_sha256(originals("llama")))
    assert "replaced" in model["pedigree"]["notes"]
    recipe = {entry["name"]: entry["value"] for entry in model["properties"]}
    assert (recipe["lockkit:recipe:depth"], recipe["lockkit:recipe:seed"]) == ("5", "0")
    found = by_name(bom["components"])
    for part in ("train", "validation", "evaluation"):
        assert sha256(found[f"stdlib, {part}"]) == record["data"][f"{part}_sha256"]
    assert found["torch"]["version"] == record["versions"]["torch"]
    assert found["transformers"]["purl"].startswith("pkg:pypi/transformers@")
    files = by_name(model["components"])
    assert set(files) == {path.name for path in folder.iterdir()} - {"bom.cdx.json"}
    assert all(sha256(files[name]) == sha256_of_file(folder / name) for name in files)
    metrics = {
        entry["type"]: entry["value"] for entry in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert float(metrics["perplexity (lockkit lock)"]) == pytest.approx(record["fidelity"]["perplexity"], rel=1e-5)


def test_the_bill_of_an_export_leads_through_the_lock_to_the_original(cli, folders, originals):
    model = bill(cli, folders / "onnx", "--lock", folders / "locked")["metadata"]["component"]
    (exported,) = model["pedigree"]["ancestors"]
    assert sha256(exported) == weights_sha256(folders / "locked")
    (original,) = exported["pedigree"]["ancestors"]
    assert sha256(original) == weights_sha256(originals("llama"))
    values = {entry["name"]: entry["value"] for entry in model["properties"]}
    assert (values["lockkit:export:precision"], values["lockkit:recipe:depth"]) == ("fp32", "5")
    again = bill(cli, folders / "onnx")["metadata"]["component"]
    assert "pedigree" not in again["pedigree"]["ancestors"][0]


def test_another_lock_and_other_options_are_refused(cli, folders, tmp_path):
    other = Path(shutil.copytree(folders / "locked", tmp_path / "other"))
    with (other / "model.safetensors").open("ab") as weights:
        weights.write(b"x")
    for lock in (other, folders / "onnx", folders):
        done = cli("card", folders / "onnx", "--bom", "--lock", lock)
        assert (done.code, done.err.count("\n")) == (2, 1) and "change --lock" in done.err
    done = cli("card", folders / "onnx", "--lock", folders / "locked")
    assert (done.code, done.err.count("\n")) == (2, 1) and "give --bom" in done.err
    assert not (folders / "onnx" / "bom.cdx.json").exists()


def test_a_missing_package_is_named(cli, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclonedx.output.json", None)
    done = cli("card", folders / "locked", "--bom")
    assert (done.code, done.err.count("\n")) == (2, 1) and "pip install 'lockkit[sign]'" in done.err
