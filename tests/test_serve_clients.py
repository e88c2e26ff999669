"""What real clients send: curl, OpenAI's client, LangChain, LiteLLM, the AI SDK, Open WebUI, editors."""

from __future__ import annotations

import json

import httpx2
import openai
import pytest
from serving import running_server, tiny_chat_model

from lockkit.export.run import export_model

NAME = "organization/tiny model"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    export_model(str(tiny_chat_model(folder / "original")), folder / "export")
    with running_server(folder / "export", "--name", NAME, "--max-batch", 8, "--max-queue", 24) as server:
        yield server


def ask(server, path: str, **fields) -> httpx2.Response:
    return server.post(path, json.dumps({"model": NAME, "max_tokens": 2} | fields).encode())


ASK_FOR_NOTHING = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": [], "user": "someone",
    "stream": False, "stream_options": {}, "seed": 3, "top_p": 1, "temperature": 1, "top_k": -1, "min_p": 0,
    "repetition_penalty": 1.0,
}  # fmt: skip
CHAT_ASKS_FOR_NOTHING = {
    "store": False, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True, "tools": [], "tool_choice": "auto",
    "functions": [], "function_call": "none", "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"},
    "modalities": ["text"], "max_completion_tokens": 2, "reasoning_effort": "none", "verbosity": "medium",
    "prompt_cache_key": "key", "safety_identifier": "hash",
}  # fmt: skip
COMPLETION_ASKS_FOR_NOTHING = {"best_of": 1, "echo": False, "logprobs": False, "suffix": ""}


def test_fields_that_ask_for_nothing_are_accepted(server):
    """Each field alone, as it asks for nothing and as null; and all together."""
    for path, needed, extra in (
        (COMPLETIONS, {"prompt": "x"}, COMPLETION_ASKS_FOR_NOTHING),
        (CHAT, {"messages": [HELLO]}, CHAT_ASKS_FOR_NOTHING),
    ):
        fields = ASK_FOR_NOTHING | extra
        for name, value in fields.items():
            for given in (value, None):
                answer = ask(server, path, **needed, **{name: given})
                assert answer.status_code == 200, (name, given, answer.text)
        assert ask(server, path, **needed, **fields).status_code == 200
        assert ask(server, path, **needed, audio=None, prediction=None, unheard_of=None).status_code == 200


REFUSED = [
    ({"n": 0}, "n must be at least 1"),
    ({"n": 33}, "n asks for 33 answers, and this server gives 32 to a request"),
    ({"frequency_penalty": -1}, "frequency_penalty must be 0: other values are not supported"),
    ({"top_k": -2}, "top_k must be at least -1"),
    ({"min_p": 2}, "min_p must be at most 1"),
    ({"repetition_penalty": 0}, "repetition_penalty must be at least 0.01"),
    ({"presence_penalty": 0.5}, "presence_penalty must be 0: other values are not supported"),
    ({"logit_bias": {"5": -100}}, "logit_bias must be {}: other values are not supported"),
    ({"logprobs": 0}, "logprobs must be true or false"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be at most 20"),
    ({"store": True}, "store must be false: other values are not supported"),
    ({"service_tier": "flex"}, 'service_tier must be "auto" or "default": other values are not supported'),
    ({"tools": [{"type": "function"}]}, "tools must be []: other values are not supported"),
    ({"tool_choice": "required"}, 'tool_choice must be "none" or "auto": other values are not supported'),
    ({"response_format": {"type": "json_object"}}, "response_format.type must be 'text': other values are not supported"),
    ({"modalities": ["text", "audio"]}, 'modalities must be ["text"]: other values are not supported'),
    ({"reasoning_effort": "high"}, 'reasoning_effort must be "none": other values are not supported'),
    ({"keep_alive": "5m"}, "keep_alive is not a field that this server supports"),
    ({"two words": 1}, "'two words' is not a field that this server supports"),
    ({"temperature": 3}, "temperature must be at most 2"),
    ({"temperature": "0.5"}, "temperature must be a number"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"stream": "true"}, "stream must be true or false"),
    ({"stream_options": {"usage": True}}, "stream_options.usage is not a field that this server supports"),
    ({"stop": ["a", None]}, "stop must be a string or a list of strings"),
    ({"stop": ["a", ""]}, "stop must have strings of 1 to 256 characters"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop must have at most 4 strings"),
    ({"messages": None}, "messages is missing"),
    ({"messages": []}, "messages must not be empty"),
    ({"messages": "Hello"}, "messages must be a list"),
    ({"messages": ["Hello"]}, "messages[0] must be an object"),
    ({"messages": [HELLO, {"content": "x"}]}, "messages[1].role is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0] has no content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be 'system', 'developer', 'user' or 'assistant'"),
    ({"messages": [HELLO | {"weight": 1}]}, "messages[0].weight is not a field that this server supports"),
    ({"messages": [HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[1].tool_calls must be []"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content must be a text, or a list"),
]  # fmt: skip


def test_everything_else_is_refused_by_name_in_one_line(server):
    for fields, words in REFUSED:
        answer = ask(server, CHAT, **{"messages": [HELLO]} | fields)
        assert answer.status_code == 400, (fields, answer.text)
        error = answer.json()["error"]
        assert error["message"].startswith(words) and "\n" not in error["message"], (words, error["message"])
        name = next(iter(set(fields) - {"messages", "logprobs"} or fields))
        assert name in error["param"] and error["type"] == "invalid_request_error"


CONVERSATIONS = [
    [{"role": "system", "content": "Be short."}, HELLO],
    [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
    [HELLO, {"role": "assistant", "content": None}, HELLO],
    [HELLO, {"role": "assistant"}, HELLO],
    [HELLO, {"role": "assistant", "content": "x", "tool_calls": [], "annotations": [], "refusal": None}, HELLO],
    [HELLO | {"name": "someone"}],
    [HELLO | {"name": None, "tool_call_id": None}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations(server, messages):
    answer = ask(server, CHAT, messages=messages)
    assert answer.status_code == 200, answer.text
    plain = []
    for message in messages:
        content = message.get("content") or ""
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        plain.append({"role": message["role"], "content": text})
    assert answer.json()["usage"] == ask(server, CHAT, messages=plain).json()["usage"]


def test_an_answer_of_the_official_client_can_be_sent_back(server):
    client = server.client()
    answer = client.chat.completions.create(model=NAME, messages=[HELLO], max_tokens=4, temperature=0)
    message = answer.choices[0].message
    for sent_back in (message, message.model_dump(), message.model_dump(exclude_unset=True)):
        again = client.chat.completions.create(model=NAME, messages=[HELLO, sent_back, HELLO], max_tokens=4)
        assert again.usage.prompt_tokens > answer.usage.total_tokens


def test_bodies_as_clients_write_them(server):
    body = json.dumps({"model": NAME, "prompt": "größe", "max_tokens": 1}, ensure_ascii=False).encode()
    kinds = ("application/x-www-form-urlencoded", "application/json; charset=UTF-8", "text/plain", "", "x")
    for sent in (body, b"\xef\xbb\xbf" + body, b"\r\n" + body + b"\n"):
        for kind in kinds:
            assert server.post(COMPLETIONS, sent, **{"Content-Type": kind}).status_code == 200, (sent, kind)
    assert b" 200 " in server.exchange(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    for sent, words in (
        (b"", "the body is empty: send a JSON object"),
        (b"prompt=x", "the body is not valid JSON: see line 1, column 1"),
        (b"[1]", "the body must be an object, not a list"),
        (b'"x"', "the body must be an object, not a string"),
        (b"\x1f\x8b\x08", "the body is not JSON: it is not valid UTF-8"),
    ):
        answer = server.post(COMPLETIONS, sent, **{"Content-Type": "application/x-www-form-urlencoded"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, words)


def test_paths_as_clients_write_them(server):
    for path in ("/v1/models", "/v1/models/", "/v1//models", "/v1/models?limit=5", "/health/", "/health?x"):
        assert server.get(path).status_code == 200, path
    for path in (COMPLETIONS + "/", "/v1//completions", COMPLETIONS + "?api-version=1"):
        assert ask(server, path, prompt="x").status_code == 200, path
    for path in ("/health", "/v1/models"):
        answer = httpx2.head(server.url + path)
        assert answer.status_code == 200 and answer.content == b"" and int(answer.headers["content-length"]) > 0
    answer = httpx2.options(server.url + COMPLETIONS)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.json()["error"]["message"]
    answer = server.get("/v1/responses")
    assert answer.status_code == 404 and "/v1/chat/completions" in answer.json()["error"]["message"]


def test_the_served_model_by_its_name(server):
    client = server.client()
    assert client.models.retrieve(NAME) == next(iter(client.models.list()))
    assert server.get("/v1/models/organization/tiny%20model").json()["id"] == NAME
    for name in ("organization", "gpt-4", "organization/tiny model/x", "..%2fetc"):
        answer = server.get(f"/v1/models/{name}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_several_prompts_get_the_answers_that_each_gets_alone(server):
    client = server.client()
    prompts, settings = ["import os\n", "def f(", "x"], {"max_tokens": 12, "temperature": 0}
    alone = [client.completions.create(model=NAME, prompt=prompt, **settings) for prompt in prompts]
    ids = [[5, 6, 7], [8]]
    for given, expected in (
        (prompts, alone),
        ([prompts[1]], [alone[1]]),
        (ids, [client.completions.create(model=NAME, prompt=one, **settings) for one in ids]),
        ([ids[0]], [client.completions.create(model=NAME, prompt=ids[0], **settings)]),
        (prompts * 8, alone * 8),
    ):
        answer = client.completions.create(model=NAME, prompt=given, **settings)
        texts = [one.choices[0].text for one in expected]
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(given)))
        assert answer.usage.total_tokens == sum(one.usage.total_tokens for one in expected)
        streamed, ends = [""] * len(given), []
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in client.completions.create(model=NAME, prompt=given, **settings, **options):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
                ends += [choice.index] if choice.finish_reason else []
        assert streamed == texts and sorted(ends) == list(range(len(given)))
        assert chunk.usage == answer.usage
    with pytest.raises(openai.BadRequestError, match="prompt has 33 prompts, and this server takes 32"):
        client.completions.create(model=NAME, prompt=["x"] * 33)
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model=NAME, prompt=[[5], [4096]])
