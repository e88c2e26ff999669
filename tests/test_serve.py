"""The server, end to end: a real process, a real export, OpenAI's client."""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from conftest import QUICK
from serving import CONTEXT, running_server, tiny_chat_model

from lockkit.export.run import export_model
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models.load import load_model, load_tokenizer

MODEL = "tiny-onnx"
PROMPTS = ["def größe(self):\n    return ", "import os\n", "class A", "x", "for i in range(10):\n    print(i", "# ☃ "]
KEY = "sk-not-a-secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `original`, `locked`, and `tiny-onnx`, the export that is served."""
    folder = tmp_path_factory.mktemp("serve")
    original = tiny_chat_model(folder / "original")
    lock_model(str(original), folder / "locked", LockConfig(**QUICK | {"tokens": 2048, "end_to_end_tokens": 0}))
    export_model(str(folder / "locked"), folder / MODEL)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running_server(folder / MODEL, "--max-batch", 8, "--max-output-tokens", CONTEXT) as server:
        yield server


@pytest.fixture(scope="module")
def strict(folder):
    """A server with tight limits: one request at a time, one in the queue, two seconds each, an API key."""
    limits = (
        "--max-batch", 1, "--max-queue", 1, "--request-seconds", 2, "--max-output-tokens", CONTEXT,
        "--max-prompt-tokens", 20, "--shutdown-seconds", 20,
    )  # fmt: skip
    with running_server(folder / MODEL, *limits, key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def reference(folder):
    """Greedy tokens of the locked model, from `generate` of transformers."""
    model, _ = load_model(folder / "locked", torch.float32)

    def generate(ids: list[int], count: int) -> list[int]:
        return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()

    return generate


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder / MODEL)


def complete(client: openai.OpenAI, prompt, **settings) -> str:
    settings = {"max_tokens": 24, "temperature": 0} | settings
    return client.completions.create(model=MODEL, prompt=prompt, **settings).choices[0].text


def without_incomplete(text: str) -> str:
    """Without an incomplete character at the end, which the server leaves out."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_completions_equal_those_of_pytorch(server, reference, tokenizer):
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        expected = reference(ids, 24)
        for given in (prompt, ids):
            answer = server.client().completions.create(model=MODEL, prompt=given, max_tokens=24, temperature=0)
            text = tokenizer.decode(ids[-4:] + expected)[len(tokenizer.decode(ids[-4:])) :]
            assert without_incomplete(answer.choices[0].text) == without_incomplete(text)
            assert answer.usage.completion_tokens == len(expected)
            assert answer.usage.total_tokens == len(ids) + len(expected)
            assert answer.choices[0].finish_reason == "length"


def test_chat_is_a_completion_of_the_templated_conversation(server, tokenizer):
    messages = [{"role": "system", "content": "code"}, {"role": "user", "content": [{"type": "text", "text": "x ="}]}]
    answer = server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    prompt = "system: code\nuser: x =\nassistant:"
    assert answer.choices[0].message.content == complete(server.client(), prompt, max_tokens=12)
    assert answer.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    with pytest.raises(openai.BadRequestError, match="an answer comes first"):
        server.client().chat.completions.create(model=MODEL, messages=[{"role": "assistant", "content": "hi"}])


def test_a_streamed_answer_is_the_whole_answer_in_pieces(server):
    for prompt in PROMPTS:
        settings = {"model": MODEL, "max_tokens": 40, "temperature": 0, "stream_options": {"include_usage": True}}
        chunks = list(server.client().completions.create(prompt=prompt, stream=True, **settings))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == complete(
            server.client(), prompt, max_tokens=40
        )
        assert chunks[-1].usage.completion_tokens == 40 and chunks[-2].choices[0].finish_reason == "length"
    messages = [{"role": "user", "content": "x"}]
    whole = server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=40, temperature=0)
    settings.pop("stream_options")
    chunks = list(server.client().chat.completions.create(messages=messages, stream=True, **settings))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_strings_end_the_answer_before_them(server):
    whole = complete(server.client(), PROMPTS[0], max_tokens=40)
    middle = whole[len(whole) // 2 :][:3]
    settings = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0, "stop": ["never!", middle]}
    answer = server.client().completions.create(**settings)
    assert answer.choices[0].text == whole[: whole.index(middle)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    chunks = list(server.client().completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_concurrent_clients_get_the_answers_that_one_client_gets(server):
    """Greedy and seeded, short and long, with twice as many clients as rows."""
    client = server.client()
    asked = [
        {"prompt": prompt * times, "max_tokens": count, **sampling}
        for prompt in PROMPTS
        for times, count in ((1, 9), (7, 33), (40, 17))  # the last takes several forward passes
        for sampling in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 7})
    ]
    alone = [complete(client, **settings) for settings in asked]
    assert len(set(alone)) > len(asked) // 2

    def ask(settings: dict) -> str:
        return complete(client, **settings)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, asked)) == alone
    assert server.metric("lockkit_batch_size_sum") > server.metric(
        "lockkit_batch_size_count"
    )  # some of them ran in one batch


def test_a_seed_repeats_its_answer_and_other_seeds_differ(server):
    texts = [complete(server.client(), "x", temperature=1, seed=seed) for seed in (1, 1, -2, 2)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert complete(server.client(), "x", temperature=1) != complete(server.client(), "x", temperature=1)
    # With a tiny top_p, only the most likely token is left.
    assert complete(server.client(), "x", temperature=1, top_p=1e-9) == complete(server.client(), "x")


def long_request(**settings) -> dict:
    """A request for thousands of tokens, which takes seconds at least."""
    return {"model": MODEL, "prompt": PROMPTS[1], "max_tokens": CONTEXT - 100, "temperature": 0} | settings


def test_a_client_that_disconnects_frees_its_row(server):
    before = server.metric("lockkit_generated_tokens_total")
    with server.client().completions.create(**long_request(stream=True)) as stream:
        next(iter(stream))
    server.wait_until(lambda: server.metric("lockkit_running_requests") == 0)
    with server.raw() as connection:  # not streamed: the client disconnects while it waits
        body = json.dumps(long_request()).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        server.wait_until(lambda: server.metric("lockkit_running_requests") == 1)
    server.wait_until(lambda: server.metric("lockkit_running_requests") == 0)
    assert server.metric("lockkit_generated_tokens_total") - before < 2 * (CONTEXT - 100)


def test_a_request_that_takes_too_long_is_ended(strict):
    with pytest.raises(openai.APIStatusError, match="more than this server's 2 seconds") as caught:
        strict.client().completions.create(**long_request())
    assert caught.value.status_code == 408
    with pytest.raises(openai.APIError, match="more than this server's 2 seconds"):
        list(strict.client().completions.create(**long_request(stream=True)))
    strict.wait_until(lambda: strict.metric("lockkit_running_requests") == 0)


def test_the_queue_is_limited(strict):
    clients = [strict.client() for _ in range(6)]  # first, since it takes a while
    everyone = threading.Barrier(len(clients))

    def outcome(client: openai.OpenAI) -> str:
        everyone.wait()
        try:
            client.completions.create(**long_request())
        except openai.APIStatusError as error:
            return f"{error.status_code} {error.code}"
        return "answered"

    with ThreadPoolExecutor(len(clients)) as pool:
        outcomes = list(pool.map(outcome, clients))
    assert outcomes.count("429 queue_full") == 4 and outcomes.count("408 request_timeout") == 2


def test_lengths_are_limited(server, strict, tokenizer):
    client = strict.client()
    with pytest.raises(openai.BadRequestError, match="this server takes 20"):
        complete(client, "import os\n" * 20)
    assert complete(client, list(range(100, 120)), max_tokens=2) is not None
    with pytest.raises(openai.BadRequestError, match=f"room for {CONTEXT - 3}, not {CONTEXT}"):
        complete(server.client(), [5, 6, 7], max_tokens=CONTEXT)
    with pytest.raises(openai.BadRequestError, match="go up to 4095"):
        complete(client, [4096])


def test_every_path_but_health_needs_the_api_key(strict):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert strict.get(path).status_code in (200, 404)
    keyless = openai.OpenAI(base_url=f"{strict.url}/v1", api_key=KEY + "x", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        keyless.models.list()
    for header in (b"", b"Authorization: Bearer\r\n", b"Authorization: Basic " + KEY.encode() + b"\r\n"):
        for path in (b"/v1/models", b"/metrics", b"/openapi.json", b"/nowhere"):
            answer = strict.exchange(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ") and b'"code":"invalid_api_key"' in answer
        health = strict.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + header + b"\r\n")
        assert health.startswith(b"HTTP/1.1 200 ")


def test_models_and_names(server):
    assert [model.id for model in server.client().models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError, match=MODEL):
        server.client().completions.create(model="gpt-4", prompt="x")


def test_shutdown_finishes_running_requests_and_logs_no_secret(folder):
    """After SIGTERM the running answer is completed, no connection is accepted, and the exit code is 0."""
    with running_server(folder / MODEL, "--max-output-tokens", CONTEXT, key=KEY) as server:
        answers, request = [], long_request(max_tokens=1500, prompt="secret words")
        thread = threading.Thread(target=lambda: answers.append(server.client().completions.create(**request)))
        thread.start()
        server.wait_until(lambda: server.metric("lockkit_running_requests") == 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ConnectionError):
            server.raw()
        thread.join()
        assert answers[0].usage.completion_tokens == 1500
        assert server.process.wait(20) == 0
        log = server.process.stderr.read()
        assert "secret" not in log and KEY not in log and "Traceback" not in log


def test_shutdown_ends_requests_after_its_time_limit(folder):
    with running_server(folder / MODEL, "--max-output-tokens", CONTEXT, "--shutdown-seconds", 0.5) as server:
        stream = server.client().completions.create(**long_request(stream=True))
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0


def test_bad_use_is_one_line_and_exit_code_2(folder, cli, tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text("two words")
    for arguments, expected in [
        ([tmp_path / "none"], "EXPORT"),
        ([folder / "locked"], "EXPORT"),
        ([folder / MODEL, "--port", 70000], "--port"),
        ([folder / MODEL, "--host", "256.0.0.1"], "--host"),
        ([folder / MODEL, "--max-batch", 0], "--max-batch"),
        ([folder / MODEL, "--request-seconds", "nan"], "--request-seconds"),
        ([folder / MODEL, "--provider", "tpu"], "--provider"),
        ([folder / MODEL, "--api-key-file", tmp_path / "none"], "--api-key-file"),
        ([folder / MODEL, "--api-key-file", key], "one word"),
    ]:
        outcome = cli("serve", *arguments)
        assert outcome.code == 2 and outcome.out == "", (arguments, outcome)
        last = outcome.err.splitlines()[-1]
        assert last.startswith("lockkit: ") and expected in last and "two words" not in outcome.err
    monkeypatch.setenv("LOCKKIT_API_KEY", "")
    assert "LOCKKIT_API_KEY must hold" in cli("serve", folder / MODEL).err
