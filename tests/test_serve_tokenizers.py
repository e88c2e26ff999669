"""Tokenizers and chat templates that need care: byte fallback, special tokens, tokens without an embedding."""

from __future__ import annotations

import asyncio
import codecs
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import torch
from serving import TEMPLATE, running_server
from test_text_stream import sentence_pieces
from tiny import save_tiny
from tokenizers import Tokenizer

from lockkit.export.manifest import read_manifest, write_manifest
from lockkit.export.run import export_model
from lockkit.models.load import load_model
from lockkit.serve.server import open_app

MODEL = "bytes"
SNOWMAN, WAVE = ([byte + 1 for byte in character.encode()] for character in "☃👋")  # byte tokens


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A model that writes random bytes, with a tokenizer as Llama 2 has it.

    `<|im_end|>` is a special token that does not end a text. `<pad>` was added without a new embedding.
    """
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer = sentence_pieces()
    tokenizer.add_special_tokens(["<|im_end|>"])
    vocabulary = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<extra>"])
    save_tiny("qwen3", folder / "original", seed=5, vocab_size=vocabulary)
    for file in (folder / "original").glob("token*"):
        file.unlink()
    tokenizer.save(str(folder / "original" / "tokenizer.json"))
    (folder / "original" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": TEMPLATE})
    )
    export_model(str(folder / "original"), folder / MODEL)
    return folder / MODEL


@pytest.fixture(scope="module")
def server(export):
    with running_server(export, "--max-batch", 64) as server:
        yield server


def complete(client: openai.OpenAI, prompt, **settings):
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 1.5, "seed": 1} | settings)


def streamed(client: openai.OpenAI, prompt: list[list[int]], **settings) -> list[str]:
    texts = [""] * len(prompt)
    for chunk in complete(client, prompt, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


def test_random_bytes_never_fail_and_a_stream_is_the_whole_answer(server):
    """2,000 answers, half of them streamed. Most of them are no valid UTF-8."""
    client = server.client()

    def both(number: int) -> list[str]:
        prompts = [[1 + (number * 50 + index) % 256, 1 + index] for index in range(50)]
        settings = {"max_tokens": 10, "seed": number}
        whole = complete(client, prompts, **settings)
        texts = [choice.text for choice in whole.choices]
        assert streamed(client, prompts, **settings) == texts
        assert whole.usage.completion_tokens > 50 * 9  # few of them end early
        return texts

    with ThreadPoolExecutor(2) as pool:
        texts = [text for some in pool.map(both, range(20)) for text in some]
    assert len(texts) == 1000 and sum("\N{REPLACEMENT CHARACTER}" in text for text in texts) > 500
    assert server.metric("lockkit_requests_total") > 0 and 'status="500"' not in server.get("/metrics").text


@pytest.fixture(scope="module")
def reference(export):
    """A function from a prompt to the text of the greedy answer: PyTorch's tokens, and Python's UTF-8 decoder."""
    model, _ = load_model(export.parent / "original", torch.float32)
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    text = {token: name.replace("▁", " ").encode() for name, token in tokenizer.get_vocab().items()}
    text |= {number: b"" for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    text |= {byte + 1: bytes([byte]) for byte in range(256)}

    def as_utf8(ids: list[int], final: bool) -> str:
        return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(text[token] for token in ids), final)

    def answer(prompt: list[int], count: int) -> str:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0].tolist()
        assert len(out) == len(prompt) + count and out[-1] != 0
        before, whole = as_utf8(prompt, True), as_utf8(out, False)
        return whole.removeprefix(before) if whole.startswith(before) else whole.removeprefix(before[:-1])

    return answer


def test_an_answer_begins_after_a_prompt_that_ends_inside_a_character(server, reference):
    """Every position in a character, after text in bytes and after text in letters."""
    client, broken = server.client(), 0
    for start in ("secret", "ab", "größe "):
        ids = [1 + byte for byte in start.encode()]
        for begun in (SNOWMAN[:1], SNOWMAN[:2], SNOWMAN, WAVE[:1], WAVE[:2], WAVE[:3], [256]):
            expected = reference([*ids, *begun], 12)
            answer = complete(client, [*ids, *begun], max_tokens=12, temperature=0)
            assert answer.choices[0].text == expected
            assert streamed(client, [[*ids, *begun]], max_tokens=12, temperature=0) == [expected]
            broken += "\N{REPLACEMENT CHARACTER}" in expected
    assert broken > 5


def test_a_stop_that_is_a_special_token_ends_the_answer(server):
    """Also with spaces around it, in a list, and in a chat. As text, it is still found in the answer."""
    client = server.client()
    settings, ended = {"max_tokens": 120}, 0
    for seed in range(12):
        free = complete(client, "a", seed=seed, **settings)
        found = complete(client, "a", seed=seed, stop=["<|im_end|>"], **settings)
        assert free.choices[0].text.startswith(found.choices[0].text)
        if found.usage.completion_tokens < free.usage.completion_tokens:
            ended += 1
            assert found.choices[0].finish_reason == "stop" and "im_end" not in found.choices[0].text
            for stop in ("<|im_end|>", " <|im_end|>\n", ["never", "<|im_end|>"]):
                again = complete(client, "a", seed=seed, stop=stop, **settings)
                assert again.choices[0].text == found.choices[0].text
                assert again.usage == found.usage
    assert ended >= 2
    texts = [complete(client, "a", seed=seed, stop="b", **settings).choices[0].text for seed in range(12)]
    assert not any("b" in text for text in texts)


def test_a_token_without_an_embedding_is_refused_by_name(server):
    client = server.client()
    missing = {"model": MODEL, "messages": [{"role": "user", "content": "a<extra>"}]}
    for call in (
        lambda: complete(client, "a<extra>b"),
        lambda: complete(client, ["a", "<extra>"]),
        lambda: complete(client, [[1, 263]]),
        lambda: client.chat.completions.create(**missing),
    ):
        with pytest.raises(openai.BadRequestError, match=r"no embedding for the token '<extra>' \(263\).* up to 262"):
            call()
    for token in (264, 10**6, 10**30):
        with pytest.raises(openai.BadRequestError, match=f"no embedding for token {token}"):
            complete(client, [[token]])
    assert complete(client, "a", max_tokens=1).usage.completion_tokens == 1


def with_template(export, folder, template):
    """A copy of the export with another chat template."""
    shutil.copytree(export, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = read_manifest(folder)
    manifest.files.pop("chat_template.jinja", None)
    write_manifest(folder, manifest)
    return folder


TEMPLATES = {
    "no chat template": (None, "has no chat template: use /v1/completions"),
    "named, without a default": (
        [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}],
        "has chat templates named rag, tool_use, and none named default: use /v1/completions",
    ),
    "not Jinja": ("{% for %}", "is no valid Jinja"),
    "adds a number to a text": ("{{ messages[0].content + 5 }}", "refuses these messages (TypeError: "),
    "undefined": ("{{ messages[0].tool.name }}", "refuses these messages (UndefinedError: "),
    "divides by zero": ("{{ 1 / 0 }}", "refuses these messages (ZeroDivisionError: "),
    "calls itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "refuses these messages (RecursionError: "),
    "refuses": ("{{ raise_exception('only\nin twos') }}", "refuses these messages (TemplateError: only)"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_cannot_be_used_is_named_at_the_start_and_in_every_refusal(export, tmp_path, caplog, kind):
    template, words = TEMPLATES[kind]
    app = open_app(with_template(export, tmp_path / MODEL, template))
    [warning] = [record.message for record in caplog.records if record.name.startswith("lockkit")]
    assert "\n" not in warning and ("chat template" in warning)

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
            return await client.post("/v1/chat/completions", json=body)

    answer = asyncio.run(ask())
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert "\n" not in answer.json()["error"]["message"]


def test_a_default_among_named_chat_templates_is_used(export, tmp_path):
    named = [{"name": "default", "template": "ab"}, {"name": "tool_use", "template": "y"}]
    with running_server(with_template(export, tmp_path / MODEL, named)) as server:
        assert server.warnings == ""
        messages = [{"role": "user", "content": "x"}]
        answer = server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
        assert answer.usage.prompt_tokens == 3  # the space before the text, and two letters
