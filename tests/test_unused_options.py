"""Options without an effect, options that contradict each other, and values that would be raised or lowered in silence."""

from __future__ import annotations

import json

import pytest
from conftest import QUICK, command_line
from test_export import exports, models  # noqa: F401 (fixtures)
from tiny import save_tiny

from lockkit.errors import UsageError
from lockkit.export import ExportConfig, export_model
from lockkit.lock.config import LockConfig, make_config
from lockkit.verify import VerifyConfig, verify_export

LOCK, EXPORT, ATTACK = (
    ("lock", "demo", "x"),
    ("export", "demo", "x"),
    ("attack", "x", "--original", "demo", "--out", "y"),
)
# The options, and what the message must name: the option without an effect, and the one to change.
REFUSED = [
    ((*LOCK, "--max-kl", "0.1", "--coupling", "0.1"), "--max-kl", "--coupling"),
    ((*LOCK, "--max-kl", "0.1", "--init", "random"), "--max-kl", "--init random"),
    ((*LOCK, "--coupling", "0.1", "--gain", "1"), "--coupling", "--gain"),
    ((*LOCK, "--offload", "disk"), "--offload", "--end-to-end-tokens"),
    ((*LOCK, "--end-to-end-batch-tokens", "64"), "--end-to-end-batch-tokens", "--end-to-end-tokens"),
    ((*LOCK, "--end-to-end-learning-rate", "1"), "--end-to-end-learning-rate", "--end-to-end-tokens"),
    ((*LOCK, "--other-text", "none", "--other-text", "docs"), "--other-text", "none"),
    ((*LOCK, "--data", "docs", "--other-text", "docs"), "--other-text", "docs"),
    ((*LOCK, "--tokens", "10"), "--tokens 10", "--batch-tokens 512"),
    ((*LOCK, "--tokens", "128", "--batch-tokens", "64"), "--tokens 128", "--block-tokens 256"),
    ((*LOCK, "--validation-tokens", "64"), "--validation-tokens 64", "--block-tokens 256"),
    ((*LOCK, "--end-to-end-tokens", "1000"), "--end-to-end-tokens 1,000", "--end-to-end-batch-tokens 1,024"),
    ((*EXPORT, "--precision", "fp32", "--block-size", "32"), "--block-size", "--precision"),
    ((*EXPORT, "--no-cuda-graphs"), "--no-cuda-graphs", "--provider"),
    (("bench", "x", "--no-cuda-graphs"), "--no-cuda-graphs", "--provider"),
    (("bench", "x", "--kernel", "--runtime", "onnxruntime-genai"), "--kernel", "--runtime"),
    (("bench", "x", "--runtime", "onnxruntime", "--runtime", "pytorch"), "--runtime", "pytorch"),
    (("serve", "x", "--no-cuda-graphs"), "--no-cuda-graphs", "--provider"),
    (("generate", "demo", "--temperature", "0", "--top-k", "4"), "--top-k", "--temperature"),
    (("generate", "demo", "--temperature", "0", "--seed", "4"), "--seed", "--temperature"),
    (("verify", "x", "--prompts", "0", "--new-tokens", "4"), "--new-tokens", "--prompts"),
    (("verify", "x", "--prompts", "0", "--min-continuations", "0.5"), "--min-continuations", "--prompts"),
    (("verify", "x", "--min-top1", "99"), "--min-top1", "at most 1"),
    (("verify", "x", "--signature", "k", "--tokens", "9"), "--tokens", "--reference"),
    (("verify", "x", "--signature", "k", "--json", "-"), "--json", "--reference"),
    ((*ATTACK, "--target-loss", "2", "--target-share", "0.8"), "--target-share", "--target-loss"),
    ((*ATTACK, "--recipe", "r.json", "--attack", "lora"), "--attack", "--recipe"),
    ((*ATTACK, "--recipe", "r.json", "--controls", "z"), "--controls", "--recipe"),
]


@pytest.mark.parametrize(
    ("arguments", "option", "other"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None
)
def test_an_option_without_an_effect_is_refused_by_name(arguments, option, other, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert (done.code, done.out) == (2, ""), done.err
    *before, said = done.err.splitlines()
    assert option in said and other in said and set(before) <= {"working ..."}  # on a slow machine
    assert not list(tmp_path.iterdir())


def test_a_recipe_may_list_defaults_that_have_no_effect(tmp_path):
    """As a recipe made from the record of another lock does; not a setting that somebody chose."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(LockConfig().model_dump() | {"coupling": 0.2}))
    assert make_config(recipe).coupling == 0.2
    recipe.write_text("offload: disk")
    assert make_config(recipe, end_to_end_tokens=4096).offload == "disk"
    with pytest.raises(UsageError, match=r"^--offload has no effect without phase 2: give --end-to-end-tokens"):
        make_config(recipe)


def test_what_the_model_limits_is_said(cli, tmp_path):
    """The context of 32 tokens, and two layers."""
    model = save_tiny("llama", tmp_path / "model", max_position_embeddings=32)
    wanted = {"tokens": 512, "end_to_end_tokens": 0, "layers_together": 9, "coupling": 0.1}
    done = cli("lock", model, tmp_path / "locked", *command_line(QUICK | wanted))
    assert done.code == 0, done.err
    assert "rows have 32 tokens, the model's context, not --block-tokens 64" in done.err
    assert "2 layers together, all of the model, not --layers-together 9" in done.err
    done = cli("lock", model, tmp_path / "self", "--data-column", "text")  # text that the model writes has no columns
    assert (done.code, done.err.splitlines()[-1].count("leave --data-column out")) == (2, 1)
    done = cli("generate", model, "--seed", "3", "--max-new-tokens", "1")
    assert done.code == 0 and "--seed has no effect" in done.err and done.err.count("\n") == 1
    assert "--seed" not in cli("generate", model, "--seed", "3", "--temperature", "1", "--max-new-tokens", "1").err


def test_limits_that_need_both_models_have_both(models, exports):  # noqa: F811
    for limit in ({"max_lock_kl": 0.1}, {"min_lock_top1": 0.9}):
        with pytest.raises(UsageError, match=rf"^--{next(iter(limit)).replace('_', '-')} needs both models"):
            verify_export(exports("llama", True), [str(models("llama", True))], VerifyConfig(**limit))
    off = VerifyConfig(max_lock_kl=float("inf"), min_lock_top1=0, prompts=0, tokens=256, block_tokens=64)
    verify_export(exports("llama", True), [str(models("llama", True))], off)
    with pytest.raises(UsageError, match=r"^--tokens 100 is less than a row of 128 tokens"):
        config = VerifyConfig(tokens=100, block_tokens=128)
        verify_export(exports("llama", False), [str(models("llama", False))], config)


def test_the_default_precision_decides_on_the_block_size_too(originals, tmp_path):
    with pytest.raises(UsageError, match=r"^--block-size has no effect in fp32"):
        export_model(str(originals("llama")), tmp_path / "out", ExportConfig(block_size=32))


def test_limits_of_a_server_above_the_context_are_said(exports, caplog):  # noqa: F811
    from lockkit import ServeConfig, open_app

    open_app(exports("llama", False), ServeConfig(max_batch=1, max_output_tokens=999))
    assert "--max-output-tokens is more than the model's context, 256 tokens" in caplog.text
    assert "--max-prompt-tokens" not in caplog.text  # its default is as high, and nobody chose it
