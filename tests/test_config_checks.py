"""config.json and generation_config.json: what no model can be built from is refused, and settings of runs are ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from tiny import save_tiny

from lockkit.errors import UsageError, first_line
from lockkit.lock.config import LockConfig
from lockkit.lock.plan import plan_model
from lockkit.lock.run import lock_model
from lockkit.models.families import family_of
from lockkit.models.layered import StreamedModel
from lockkit.models.load import load_config, load_model

REFUSED = {
    "unknown activation": ({"hidden_act": "foo"}, "hidden_act is 'foo', which transformers does not have"),
    "unknown rope": ({"rope_scaling": {"type": "foo"}}, "rope_type is 'foo', which transformers does not have"),
    "padding outside": ({"pad_token_id": 5000}, "pad_token_id is 5000, and vocab_size is 4096"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size is 0"),
    "negative vocabulary": ({"vocab_size": -5, "pad_token_id": None}, "vocab_size is -5"),
    "no key heads": ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    "text for a number": ({"vocab_size": "x"}, "'vocab_size': TypeError: .* expected int, got str"),
    "heads do not divide": ({"hidden_size": 33}, r"hidden size \(33\) is not a multiple"),
}


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny model, for tests that change its configuration."""
    return save_tiny("llama", tmp_path / "model")


def change(file: Path, **changes: object) -> None:
    """Change entries of a JSON file, which need not exist."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | changes))


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_from_which_no_model_can_be_built_is_refused_in_one_line(model, name):
    changes, reason = REFUSED[name]
    change(model / "config.json", **changes)
    for use in (lambda: load_model(model), lambda: plan_model(str(model), [4]), lambda: open_in_layers(model)):
        with pytest.raises(UsageError, match=rf"config.json cannot be used \(.*{reason}.*\): change MODEL") as refused:
            use()
        assert len(str(refused.value).splitlines()) == 1


def open_in_layers(folder: Path) -> StreamedModel:
    config = load_config(folder)
    return StreamedModel(folder, config, family_of(config), "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
        {"gradient_checkpointing": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_a_run_do_not_matter(model, tmp_path, settings):
    expected = load_model(model)[0](torch.tensor([[1, 2, 3]])).logits
    change(model / "config.json", **settings)
    loaded, _ = load_model(model)
    result = loaded(torch.tensor([[1, 2, 3]]))
    assert torch.equal(result.logits, expected) and not result.attentions and not result.hidden_states
    lock_model(str(model), tmp_path / "locked", LockConfig(**QUICK | {"tokens": 512, "end_to_end_tokens": 512}))
    written = json.loads((tmp_path / "locked" / "config.json").read_text())
    assert not {name for name, value in settings.items() if written.get(name) == value}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        ('{"eos_token_id": "a"}', "eos_token_id is 'a'"),
        ('{"eos_token_id": [1, null]}', "eos_token_id is .* no token id"),
        ('{"pad_token_id": true}', "pad_token_id is True"),
        ('{"bos_token_id": 1.5}', "bos_token_id is 1.5"),
        ('{"temperature": -1}', "temperature is -1 .* must be a number from 0"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"top_k": "many"}', "top_k is 'many'"),
        ('{"num_beams": 0}', "num_beams is 0 .* must be a number from 1"),
        ('{"cache_implementation": "none such"}', "cannot be used .*cache_implementation"),
    ],
)
def test_a_broken_generation_config_is_refused_when_the_model_is_opened(model, content, reason):
    (model / "generation_config.json").write_text(content)
    for use in (lambda: load_model(model), lambda: plan_model(str(model), [4]), lambda: load_config(model)):
        with pytest.raises(UsageError, match=rf"(?s)^(?=.*generation_config.json).*{reason}.*change MODEL") as refused:
            use()
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
        {"temperature": 0, "eos_token_id": [0, 5], "pad_token_id": -1, "bos_token_id": None},
        {"num_beams": 4, "num_return_sequences": 2, "max_length": 9, "suppress_tokens": [1]},
    ],
)
def test_an_ordinary_generation_config_is_accepted_without_a_warning(model, settings, capfd):
    change(model / "generation_config.json", **settings)
    load_config(model)
    assert not capfd.readouterr().err


def test_an_audit_names_an_original_that_cannot_be_built_before_the_work(cli, originals, locks, tmp_path):
    original = shutil.copytree(originals("llama"), tmp_path / "original")
    change(original / "config.json", hidden_act="foo")
    outcome = cli("attack", locks("llama"), "--original", original, "--out", tmp_path / "audit")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "config.json cannot be used (hidden_act is 'foo'" in said
    assert said.endswith("change --original")
    assert not (tmp_path / "audit").exists()


def test_the_cause_after_a_colon_is_kept():
    assert first_line(ValueError("\nValidation error for field 'a':\n   TypeError: b\nc")) == (
        "Validation error for field 'a': TypeError: b"
    )
    assert first_line(ValueError("nothing follows:")) == "nothing follows:"
