"""Generation: the same text as transformers' `generate`, from PyTorch and from an export."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
import torch
from tiny import VOCAB, add_token, save_tiny
from transformers import ByT5Tokenizer

from lockkit.errors import UsageError
from lockkit.export.config import ExportConfig
from lockkit.export.run import export_model
from lockkit.generate import (
    GenerateConfig,
    Generation,
    Sampling,
    first_difference,
    generate,
    next_token,
    open_model,
    sampling_defaults,
)
from lockkit.models.load import load_model

PROMPT = "def größe(self):\n    return "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("generate") / "model", seed=3)


@pytest.fixture(scope="module")
def export(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "onnx"
    export_model(str(folder), out, ExportConfig())
    return out


def expected_ids(folder, prompt: str, count: int) -> list[int]:
    """Greedy tokens, from `generate` of transformers."""
    model, _ = load_model(folder, torch.float32)
    tokenizer = open_model(str(folder)).tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


def test_pytorch_and_onnx_generate_what_transformers_does(folder, export):
    expected = expected_ids(folder, PROMPT, 24)
    for name in (folder, export):
        model, pieces = open_model(str(name)), []
        found = generate(model, PROMPT, GenerateConfig(max_new_tokens=24), pieces.append)
        assert found.token_ids == expected and found.stopped == "max_new_tokens"
        assert "".join(pieces) == found.text == model.tokenizer.decode(expected)
        assert found.ends == sorted(found.ends) and found.characters(None) == len(found.text)


def test_an_empty_prompt_starts_at_the_begin_or_the_end_of_text(folder, tmp_path):
    model = open_model(str(folder))
    assert model.start_id == 0  # from the configuration, since this tokenizer has no begin-of-text token
    found = generate(model, "", GenerateConfig(max_new_tokens=5))
    assert found == Generation(
        "", [], [], "end of text"
    )  # token 0 is padding with an embedding of zeros, and the model repeats it
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    settings = json.loads((changed / "config.json").read_text()) | {"bos_token_id": 77}
    (changed / "config.json").write_text(json.dumps(settings))
    network, _ = load_model(folder, torch.float32)
    expected = network.generate(torch.tensor([[77]]), max_new_tokens=5, do_sample=False)[0, 1:].tolist()
    assert generate(open_model(str(changed)), "", GenerateConfig(max_new_tokens=5)).token_ids == expected


def test_generation_stops_at_an_end_of_text_token(folder, export, tmp_path):
    ids = expected_ids(folder, PROMPT, 24)
    fifth = ids[5]
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    for name in ("generation_config.json", "config.json"):  # either is enough; a list or a number
        shutil.copytree(folder, changed, dirs_exist_ok=True)
        settings = json.loads((changed / name).read_text())
        settings["eos_token_id"] = [0, fifth] if name == "generation_config.json" else fifth
        (changed / name).write_text(json.dumps(settings))
        found = generate(open_model(str(changed)), PROMPT, GenerateConfig(max_new_tokens=24))
        assert found.token_ids == ids[: ids.index(fifth)] and found.stopped == "end of text"


def test_generation_stops_at_the_end_of_the_context(folder):
    model = open_model(str(folder))
    prompt = model.tokenizer.decode(list(range(300, 500)))
    length = len(model.tokenizer(prompt)["input_ids"])
    assert length < 256
    found = generate(model, prompt, GenerateConfig(max_new_tokens=1000))
    assert len(found.token_ids) == 256 - length and found.stopped == "context"
    with pytest.raises(UsageError, match="--prompt"):
        generate(model, prompt * 3, GenerateConfig())


def test_a_seed_gives_the_same_tokens_in_pytorch_and_onnx(folder, export):
    texts = {}
    for seed in (1, 1, 2):
        config = GenerateConfig(max_new_tokens=12, temperature=1.0, seed=seed)
        found = [generate(open_model(str(name)), PROMPT, config).token_ids for name in (folder, export)]
        assert found[0] == found[1] == texts.setdefault(seed, found[0])
    assert texts[1] != texts[2]


def test_next_token_follows_the_distribution():
    logits, random = torch.tensor([0.0, 2.0, -1.0]), torch.Generator().manual_seed(0)
    assert next_token(logits, 0.0, random) == 1
    assert {next_token(logits, 1e-30, random) for _ in range(20)} == {1}
    drawn = torch.tensor([next_token(logits, 2.0, random) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, (logits / 2).softmax(-1), atol=0.03, rtol=0)


def test_top_k_and_min_p_limit_the_choice_as_in_transformers():
    """Against transformers' own logits processors."""
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        logits = 3 * torch.randn(40, generator=generator)
        before = torch.randint(0, 40, (6,), generator=generator)
        sampling = Sampling(temperature=0.7, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
        steps = [
            RepetitionPenaltyLogitsProcessor(1.3),
            lambda _, scores: scores / 0.7,
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ]
        expected = logits[None].clone()
        for step in steps:
            expected = step(before[None], expected)
        drawn = [sampling.choose(logits, torch.Generator().manual_seed(seed), before.tolist()) for seed in range(200)]
        shares = torch.bincount(torch.tensor(drawn), minlength=40) / 200
        assert set(drawn) <= set(expected[0].isfinite().nonzero().flatten().tolist())
        assert (shares - expected[0].softmax(-1)).abs().max() < 0.15


def test_the_models_own_settings_are_the_default(folder, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    file = changed / "generation_config.json"
    given = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    model = open_model(str(changed))
    assert Sampling(**model.defaults) == Sampling(0.6, 20, 0.95, 0.0, 1.1)
    own = generate(model, PROMPT, GenerateConfig(max_new_tokens=12)).token_ids
    del given["do_sample"]
    assert own == generate(open_model(str(folder)), PROMPT, GenerateConfig(max_new_tokens=12, **given)).token_ids
    greedy = generate(model, PROMPT, GenerateConfig(max_new_tokens=12, temperature=0, repetition_penalty=1)).token_ids
    assert greedy == expected_ids(folder, PROMPT, 12)
    for damaged in ("[1", "[]", '{"do_sample": true, "top_p": "x", "top_k": -1}'):
        file.write_text(damaged)
        assert sampling_defaults(changed) in ({}, {"temperature": 1.0})


def test_chat_puts_the_prompt_into_the_models_template(folder, cli, tmp_path):
    done = cli("generate", folder, "--chat", "--prompt", "x")
    assert done.code == 2 and "has no chat template: leave out --chat" in done.err
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    (changed / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|")
    wrapped = cli("generate", changed, "--chat", "--prompt", "x", "--max-new-tokens", "8")
    assert wrapped.code == 0, wrapped.err
    assert wrapped.out == cli("generate", folder, "--prompt", "<user>x|", "--max-new-tokens", "8").out


def test_a_text_that_fills_the_positions_ends_with_a_line(folder, cli):
    done = cli("generate", folder, "--prompt", "x" * 250, "--max-new-tokens", "300", "--temperature", "1")
    assert done.code == 0 and "fills the model's 256 positions" in done.err and done.err.count("\n") == 1


class Script:
    """A model that always generates these tokens."""

    def __init__(self, ids: list[int]):
        self.ids = ids

    def begin(self, rows, tokens):
        self.left = iter(self.ids)
        return self

    def next_logits(self, given):
        return torch.nn.functional.one_hot(torch.tensor([next(self.left)]), 4096).float()


@pytest.mark.parametrize("tokenizer", ["bundled", "in Python"])
def test_text_never_shows_a_part_of_a_character(folder, tokenizer):
    model, pieces = open_model(str(folder)), []
    if tokenizer == "in Python":  # not from the package tokenizers
        model.tokenizer = ByT5Tokenizer()
    ids = model.tokenizer("aß☃b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 4  # bytes of a character are tokens of their own
    model.runner = Script(ids)
    found = generate(model, "x", GenerateConfig(max_new_tokens=len(ids)), pieces.append)
    assert found.text == "".join(pieces) == "aß☃b" and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    for count in range(1, len(ids)):  # end anywhere, also inside a character
        cut = generate(model, "x", GenerateConfig(max_new_tokens=count))
        assert cut.text == found.text[: found.ends[count - 1]] and cut.ends == found.ends[:count]


def test_parting():
    def of(*ids):
        return Generation("", list(ids), [0] * len(ids), "max_new_tokens")

    assert first_difference(of(1, 2, 3), of(1, 2, 3)) is None
    assert first_difference(of(1, 2, 3), of(1, 5, 3)) == 1
    assert first_difference(of(1, 2), of(1, 2, 3)) == 2
    assert first_difference(of(), of(4)) == 0


def test_one_model_streams_its_text(folder, export, cli, monkeypatch):
    text = open_model(str(folder)).tokenizer.decode(expected_ids(folder, PROMPT, 8))
    outcome = cli("generate", export, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert (outcome.code, outcome.out, outcome.err) == (0, text + "\n", "")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode(encoding))))
        assert cli("generate", folder, "--prompt", "-", "--max-new-tokens", 8).out == text + "\n"


def test_two_models_side_by_side(folder, export, cli, tmp_path):
    same = cli("generate", folder, export, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert same.code == 0 and "identical: 8 tokens" in same.out
    assert all(len(line) <= 80 for line in same.out.splitlines())
    other = save_tiny("llama", tmp_path / "other", seed=4)
    different = cli("generate", export, other, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert different.code == 0 and "first difference at token" in different.out


def test_a_token_beyond_the_embeddings_is_named(folder, cli, tmp_path):
    changed, exported = tmp_path / "model", tmp_path / "onnx"
    shutil.copytree(folder, changed)
    add_token(changed, "<extra>")
    export_model(str(changed), exported, ExportConfig())
    for model in (changed, exported):
        assert cli("generate", model, "--prompt", PROMPT, "--max-new-tokens", 2).code == 0
        outcome = cli("generate", model, "--prompt", "a <extra>")
        assert outcome.code == 2 and outcome.out == ""
        assert f"the prompt cannot be read: the token '<extra>' has the id {VOCAB}" in outcome.err


def test_bad_use_is_one_line_and_exit_code_2(folder, export, cli, tmp_path):
    damaged = tmp_path / "onnx"
    shutil.copytree(export, damaged)
    (damaged / "model.onnx").write_bytes(b"nothing")
    for arguments, expected in [
        ([tmp_path / "none"], "MODEL"),
        ([folder, tmp_path / "none"], "SECOND"),
        ([damaged], "model.onnx"),
        ([folder, "--temperature", -1], "--temperature"),
        ([folder, "--max-new-tokens", 0], "--max-new-tokens"),
        ([folder, "--provider", "tpu"], "--provider"),
        ([folder, "--prompt", "word " * 400], "--prompt"),
        ([folder, "--prompt", os.fsdecode(b"caf\xe9")], "not valid UTF-8 (character 3): change --prompt"),
    ]:
        outcome = cli("generate", *arguments)
        assert outcome.code == 2 and outcome.out == "", (arguments, outcome)
        last = outcome.err.splitlines()[-1]
        assert last.startswith("lockkit: ") and expected in last and "Traceback" not in outcome.err
