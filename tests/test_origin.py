"""What a lock and an export keep of the model they were made from: licence files, and the YAML of its card."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import QUICK, command_line
from huggingface_hub import ModelCard
from test_export import exports, models  # noqa: F401 (fixtures)
from tiny import save_tiny

from lockkit.export import check_manifest, export_model
from lockkit.files import LOCK_RECORD
from lockkit.lock.card import locked_model_card
from lockkit.models.origin import LEGAL_FILES, Origin, legal_files, origin_of

CARD = """---
language:
- en
- no
license: other
license_name: llama-example
license_link: LICENSE.txt
base_model: /home/someone/llama
library_name: peft
pipeline_tag: text2text-generation
datasets: [example/corpus]
tags: [facebook, pytorch, safetensors]
extra_gated_prompt: "You agree to the policy."
extra_gated_fields:
  Country: country
  I accept the policy: checkbox
model-index:
- name: original
  results: []
---
# The original
"""
LEGAL = {
    "LICENSE.txt": "the licence",
    "USE_POLICY.md": "the policy",
    "Notice": "the notice",
    "GEMMA_TERMS_OF_USE.md": "the terms",
    "Tongyi Qianwen LICENSE AGREEMENT": "the agreement",
    "licence.pdf": "a PDF",
}


@pytest.fixture(scope="module")
def licensed(tmp_path_factory):
    """A tiny original with a card and licence files, and its lock and export, made by the commands' functions."""
    from lockkit.lock.config import LockConfig
    from lockkit.lock.run import lock_model

    folder = tmp_path_factory.mktemp("licensed")
    save_tiny("llama", folder / "original")
    (folder / "original" / "README.md").write_text(CARD)
    for name, text in LEGAL.items():
        (folder / "original" / name).write_text(text)
    (folder / "original" / "license_classifier.bin").write_bytes(b"weights of something else")
    settings = QUICK | {"tokens": 512, "end_to_end_tokens": 0, "validation_tokens": 64}
    lock_model(str(folder / "original"), folder / "locked", LockConfig(**settings))
    export_model(str(folder / "locked"), folder / "onnx")
    return folder


@pytest.mark.parametrize("copy", ["locked", "onnx"])
def test_licence_files_are_copied_unchanged(licensed, copy):
    folder = licensed / copy
    assert {name: (folder / name).read_text() for name in legal_files(folder)} == LEGAL
    assert not (folder / "license_classifier.bin").exists()


@pytest.mark.parametrize("copy", ["locked", "onnx"])
def test_the_card_keeps_the_originals_yaml_and_states_the_change(licensed, copy):
    card = ModelCard.load(licensed / copy / "README.md")
    found, original = card.data.to_dict(), ModelCard(CARD).data.to_dict()
    for key in ("license", "license_name", "license_link", "extra_gated_prompt", "extra_gated_fields"):
        assert found[key] == original[key]
    assert found["language"] == ["en", "no"]
    assert found["datasets"] == ["example/corpus"]
    assert found["pipeline_tag"] == "text-generation"
    assert "facebook" in found["tags"] and not {"pytorch", "safetensors"} & set(found["tags"])
    assert {"lockkit", "dlr-lock"} <= set(found["tags"])
    assert found["library_name"] == {"locked": "transformers", "onnx": "onnx"}[copy]
    assert not {"base_model", "base_model_relation", "model-index"} & set(found)  # a local path, other figures
    assert "llama-example" in card.text and "`USE_POLICY.md`" in card.text
    assert "changed copy" in card.text and "was replaced by a chain" in card.text
    assert str(licensed) not in card.content and "/home/someone" not in card.content


def test_the_record_names_the_licence(licensed):
    record = json.loads((licensed / "locked" / LOCK_RECORD).read_text())
    assert record["licence"] == {"name": "llama-example", "files": sorted(LEGAL)}


def test_the_manifest_lists_licence_files_and_not_the_card(licensed):
    listed = set(check_manifest(licensed / "onnx").files)
    assert set(LEGAL) < listed and "README.md" not in listed


def test_a_model_without_a_licence_is_named_by_card_and_command(cli, locks, tmp_path):
    text = (locks("llama") / "README.md").read_text()
    assert "llama` names no licence" in text
    done = cli("export", locks("llama"), tmp_path / "onnx")
    assert done.out.splitlines()[-1] == f"llama names no licence: ask its owner before you publish {tmp_path / 'onnx'}"
    assert "names no licence" in (tmp_path / "onnx" / "README.md").read_text()
    assert "names no licence" not in cli("export", "demo", tmp_path / "demo").out


def test_the_lock_command_says_that_there_is_no_licence(cli, originals, tmp_path):
    settings = QUICK | {"tokens": 512, "end_to_end_tokens": 0, "validation_tokens": 64}
    options = command_line(settings)
    done = cli("lock", originals("llama"), tmp_path / "out", *options)
    assert done.out.splitlines()[-1].startswith("llama names no licence: ask its owner")


def record(locks):
    return json.loads((locks("llama") / LOCK_RECORD).read_text())


def test_a_hub_original_is_the_base_model(locks):
    values = record(locks) | {"model": "owner/model", "data": {"source": "owner/text:en"}}
    metadata = {"license": "other", "license_link": "LICENSE", "base_model": "owner/older"}
    data = ModelCard(locked_model_card(values, Origin("owner/model", "owner/model", metadata, ()))).data
    assert (data.base_model, data.base_model_relation) == ("owner/model", "finetune")
    assert data.datasets == ["owner/text"]
    assert data.license_link == "https://huggingface.co/owner/model/blob/main/LICENSE"


def test_a_local_original_passes_on_the_base_model_of_its_card(locks):
    metadata = {"base_model": ["owner/older", "./local", "/a/b"], "license": "mit"}
    data = ModelCard(locked_model_card(record(locks), Origin("llama", None, metadata, ()))).data
    assert (data.base_model, data.base_model_relation) == ("owner/older", "finetune")


@pytest.mark.parametrize(
    "yaml", ["a: [", "- a\n- b", "released: 2024-13-45", "to_dict: 1\nself: 2\n3: 4\nget: 5", "license: [mit, 3]"]
)
def test_a_card_with_broken_yaml_stops_nothing(yaml, locks, originals, tmp_path):
    folder = shutil.copytree(originals("llama"), tmp_path / "llama")
    (folder / "README.md").write_text(f"---\n{yaml}\n---\n# Model\n")
    origin = origin_of(str(folder), folder)
    card = ModelCard(locked_model_card(record(locks), origin))
    assert card.data.library_name == "transformers"
    assert len(origin.warning(tmp_path).splitlines()) == (0 if "mit" in yaml else 1)


def test_the_patterns_for_the_hub_match_what_is_copied():
    from huggingface_hub.utils import filter_repo_objects

    ordinary = ["model.py", "weights.bin", "config.yaml", ".gitattributes"]
    assert sorted(filter_repo_objects([*LEGAL, *ordinary], allow_patterns=LEGAL_FILES)) == sorted(LEGAL)


def snippets(folder) -> list[str]:
    """The Python in a card, for this folder."""
    found = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return [code.replace("path/to/this/folder", str(folder)) for code in found]


def test_the_code_in_the_card_of_an_export_runs(exports, capfd):  # noqa: F811
    pytest.importorskip("onnxruntime_genai")
    with_genai, with_onnxruntime, with_optimum = snippets(exports("qwen3", True))
    exec(with_genai, {})
    assert capfd.readouterr().out.startswith("Once upon a time")
    values: dict = {}
    exec(with_onnxruntime, values)
    assert values["logits"].shape[:2] == (1, 1)  # of the last token
    compile(with_optimum, "card", "exec")  # tests/consumers runs optimum, in another environment


def test_the_code_in_the_card_of_a_lock_runs(locks):
    (code,) = snippets(locks("llama"))
    values: dict = {}
    exec(code, values)
    assert values["model"].config.model_type == "dlr_lock_llama"
    assert len(values["tokenizer"]("def f(x):").input_ids) > 1
