"""Sampling settings, several answers and log probabilities of the server, by OpenAI's client, against PyTorch."""

from __future__ import annotations

import json
from datetime import datetime

import openai
import pytest
import torch
from serving import running_server, tiny_chat_model

from lockkit.export.run import export_model
from lockkit.models.load import load_model, load_tokenizer

MODEL = "export"
PROMPT = "def read(path):"
MESSAGES = [{"role": "user", "content": "x ="}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    tiny_chat_model(folder / "original")
    export_model(str(folder / "original"), folder / MODEL)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running_server(folder / MODEL, "--request-log", folder / "requests.jsonl", "--max-batch", 8) as server:
        yield server


def complete(server, prompt=PROMPT, **settings):
    return server.client().completions.create(
        model=MODEL, prompt=prompt, **{"max_tokens": 12, "temperature": 0} | settings
    )


def sampled(server, **settings) -> str:
    extra = {name: settings.pop(name) for name in ("top_k", "min_p", "repetition_penalty") if name in settings}
    return complete(server, **settings, extra_body=extra).choices[0].text


def test_limits_of_sampling(server):
    greedy = sampled(server)
    hot = {"temperature": 1.8, "seed": 5}
    assert sampled(server, **hot) != greedy
    for limit in ({"top_k": 1}, {"min_p": 1}, {"top_p": 1e-9}):
        assert sampled(server, **hot, **limit) == greedy
    for nothing in ({"top_k": 0}, {"top_k": -1}, {"min_p": 0}, {"repetition_penalty": 1}):
        assert sampled(server, **hot, **nothing) == sampled(server, **hot)


def test_a_repetition_penalty_is_that_of_transformers(server, folder):
    model, _ = load_model(folder / "original", torch.float32)
    tokenizer = load_tokenizer(folder / "original")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.7)[0, ids.shape[1] :]
    found = complete(server, logprobs=0, extra_body={"repetition_penalty": 1.7}).choices[0]
    assert found.logprobs.tokens == [tokenizer.decode([token]) for token in expected.tolist()]


@torch.no_grad()
def test_log_probabilities_are_those_of_pytorch(server, folder):
    model, _ = load_model(folder / "original", torch.float32)
    tokenizer = load_tokenizer(folder / "original")
    prompt = tokenizer(PROMPT)["input_ids"]
    new = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    values = torch.log_softmax(model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].double(), -1)
    choice = complete(server, logprobs=3).choices[0]
    assert choice.logprobs.tokens == [tokenizer.decode([token]) for token in new]
    wanted = values[torch.arange(12), new]
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs).double(), wanted, rtol=0, atol=1e-3)
    assert choice.logprobs.text_offset[0] == 0 and choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    for place, top in enumerate(choice.logprobs.top_logprobs):
        best = values[place].topk(3)
        texts = [tokenizer.decode([token]) for token in best.indices.tolist()]
        assert set(top) == set(texts) and max(top.values()) == pytest.approx(best.values[0].item(), abs=1e-3)
    assert complete(server).choices[0].logprobs is None


def test_log_probabilities_of_a_chat_and_of_its_stream(server):
    settings = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    choice = server.client().chat.completions.create(**settings).choices[0]
    assert len(choice.logprobs.content) == 10 and all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    for token in choice.logprobs.content:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob) and token.logprob <= 0
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    chunks = server.client().chat.completions.create(**settings, stream=True)
    streamed = [token for chunk in chunks for one in chunk.choices if one.logprobs for token in one.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in choice.logprobs.content]
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs: true"):
        server.client().chat.completions.create(**settings | {"logprobs": False})


def test_a_stop_string_is_not_among_the_tokens(server):
    whole = complete(server, logprobs=0).choices[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = complete(server, logprobs=0, stop=[stop]).choices[0]
    assert cut.text == whole.text.partition(stop)[0]
    assert cut.logprobs.tokens == whole.logprobs.tokens[: len(cut.logprobs.tokens)]
    assert all(offset < max(1, len(cut.text)) for offset in cut.logprobs.text_offset)


def test_several_answers(server):
    settings = {"temperature": 1.5, "seed": 11}
    prompts = [PROMPT, "import os"]
    found = complete(server, prompts, n=3, **settings)
    assert [choice.index for choice in found.choices] == list(range(6))
    texts = [choice.text for choice in found.choices]
    assert len(set(texts[:3])) == 3
    for number, prompt in enumerate(prompts):
        alone = complete(server, prompt, **settings)
        assert texts[3 * number] == alone.choices[0].text  # the first answer is that of a request for one
        assert complete(server, prompt, **settings | {"seed": 12}).choices[0].text == texts[3 * number + 1]
    assert found.usage.prompt_tokens == sum(complete(server, prompt).usage.prompt_tokens for prompt in prompts)
    chat = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "n": 2, **settings}
    whole = [choice.message.content for choice in server.client().chat.completions.create(**chat).choices]
    pieces, opened = ["", ""], []
    for chunk in server.client().chat.completions.create(**chat, stream=True):
        for choice in chunk.choices:
            opened += [choice.index] if choice.delta.role else []
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == whole and opened == [0, 1] and whole[0] != whole[1]


def test_the_models_own_settings_are_the_default(folder):
    """As in `lockkit generate`; a request's own settings replace them."""
    original, export = folder / "greedy", folder / "greedy-export"
    tiny_chat_model(original)
    file = original / "generation_config.json"
    given = {"do_sample": True, "temperature": 0.9, "top_k": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    export_model(str(original), export)
    with running_server(export) as server:
        create = server.client().completions.create
        settings = {"model": "greedy-export", "prompt": PROMPT, "max_tokens": 12}
        texts = {create(**settings, seed=seed).choices[0].text for seed in range(4)}
        assert texts == {create(**settings, temperature=0).choices[0].text}
        free = {
            create(**settings, temperature=1.8, seed=seed, extra_body={"top_k": 0}).choices[0].text for seed in range(4)
        }
        assert len(free) > 1


def test_the_request_log_has_figures_and_no_text(server, folder):
    secret, log = "a secret word", folder / "requests.jsonl"
    before = log.read_text().count("\n")  # of other tests
    answer = complete(server, [secret, "x"], n=2, max_tokens=3)
    server.post("/v1/completions", json.dumps({"model": MODEL, "prompt": secret, "temperature": 9}).encode())
    server.get(f"/v1/{secret.replace(' ', '-')}")
    # A line comes after its answer. That of the last test may come only now, but no other test asks for an unknown path.
    server.wait_until(lambda: log.read_text().count("\n") >= before + 3 and '"other"' in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()[-3:]]
    assert [(line["endpoint"], line["status"]) for line in lines] == [
        ("/v1/completions", 200), ("/v1/completions", 400), ("other", 404),
    ]  # fmt: skip
    assert lines[0]["answers"] == 4 and lines[0]["completion_tokens"] == answer.usage.completion_tokens == 12
    assert lines[0]["prompt_tokens"] == answer.usage.prompt_tokens and lines[1]["answers"] == 0
    assert all(datetime.fromisoformat(line["time"]).tzinfo and line["seconds"] >= 0 for line in lines)
    assert "secret" not in log.read_text() and secret not in log.read_text()
