"""Hostile and broken clients: the server refuses with a reason, and keeps answering others."""

from __future__ import annotations

import json
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import read_all, running_server, tiny_chat_model

from lockkit.export.run import export_model

MODEL = "tiny-onnx"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    export_model(str(tiny_chat_model(folder / "original")), folder / MODEL)
    limits = ("--read-seconds", 1, "--max-connections", 300, "--max-body-bytes", 20_000, "--max-output-tokens", 100)
    with running_server(folder / MODEL, *limits) as server:
        yield server


@pytest.fixture(autouse=True)
def survives(server):
    """After every test the same process still answers, and no request is running."""
    yield
    server.wait_until(lambda: server.get("/health").status_code == 200)
    server.wait_until(lambda: server.metric("lockkit_running_requests") == 0)
    assert server.process.poll() is None


def refused(answer, status: int = 400) -> str:
    """Check that an answer is an error in OpenAI's form; return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error["message"]


def test_bodies_that_are_not_requests(server):
    for body in (
        b"", b"{", b"nonsense", b"null", b"[]", b'"x"', b"1e400", b"[" * 15_000, b'{"a":' * 3000, b"\xff\xfe{}", b"\0" * 99,
        b'{"model": "tiny-onnx", "prompt": "\xff"}', b'{"model": "tiny-onnx", "prompt": "\\ud800"}',
        b'{"model": "tiny-onnx", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ):  # fmt: skip
        message = refused(server.post(COMPLETIONS, body))
        assert message.startswith("the body ") and "\n" not in message and "dictionary" not in message, (body, message)
    for fields, words in (
        (b'"prompt": "x", "prompt": "y"', "'prompt' more than once"),
        (b'"prompt": "x", "temperature": NaN', "temperature must be a number"),
        (b'"prompt": "x", "n": -Infinity', "n must be a whole number"),
        (b'"prompt": "x", "temperature": 1e999', "temperature must be a number"),
        (b'"prompt": "x", "a\\ud800": 1', "surrogate"),
        (b'"prompt": "x", "a\\n\\u0000b": 1', "'a\\n\\x00b'"),
        (b'"prompt": "x", "' + b"y" * 500 + b'": 1', "yyy..."),
        (b'"prompt": "x", "stop": ["a", null]', "stop must be a string or a list of strings"),
        (b'"prompt": ["x", [1]]', "prompt must be a text, a list of texts"),
    ):
        assert words in refused(server.post(COMPLETIONS, b'{"model": "tiny-onnx", ' + fields + b"}"))


def test_a_web_page_cannot_send_a_request_without_asking_first(server):
    """Browsers send a form or plain text to any server at once. They ask it before they send JSON."""
    body = b'{"model": "tiny-onnx", "prompt": "x", "max_tokens": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert server.post(COMPLETIONS, body, **{"Content-Type": kind}).status_code == 200
        page = {"Content-Type": kind, "Origin": "http://example.com"}
        assert "Content-Type: application/json" in refused(server.post(COMPLETIONS, body, **page))
    assert server.post(COMPLETIONS, body, Origin="http://example.com").status_code == 200


def test_invalid_values_are_refused_by_name(server):
    for name, values in {
        "max_tokens": (-1, 0, 101, 10**30, 1.5, "5", True, [], float("nan"), float("inf")),
        "temperature": (-0.1, 2.1, 10**400, "1", float("nan"), float("-inf"), {}),
        "top_p": (0, -1, 1.1, float("nan"), "x"),
        "seed": (2**63, -(2**63) - 1, 1.5, "1", float("nan")),
        "n": (0, 129, -1, 1.5, "1", 10**100),
        "stop": ("", ["a"] * 5, [1], ["x" * 300], {}),
        "prompt": (
            None,
            5,
            [-1],
            [4096],
            [10**30],
            [1.5],
            ["a", 1],
            [[1], "a"],
            [["a"]],
            [[4096]],
            [True],
            {"a": 1},
            ["a"] * 300,
        ),
        "model": (None, 5, ["tiny-onnx"]),
        "stream": (1, "yes"),
        "logprobs": (6, -1, True),
        "top_k": (-2, 1.5),
        "min_p": (1.5, -1),
        "repetition_penalty": (0, 5e-324, 11),
        "echo": (True,),
        "unknown": (1,),
    }.items():
        for value in values:
            body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2} | {name: value}).encode()
            assert name in refused(server.post(COMPLETIONS, body)), (name, value)
    for messages in (
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        "x",
        [{"role": "user", "content": 5}],
    ):
        refused(server.post("/v1/chat/completions", json.dumps({"model": MODEL, "messages": messages}).encode()))
    refused(server.post(COMPLETIONS, b'{"model": "../../etc/passwd", "prompt": "x"}'), 404)
    refused(server.get("/v1/../../etc/passwd"), 404)
    refused(server.get(COMPLETIONS), 405)


def test_a_prompt_that_is_one_long_word(server):
    """It fills the largest allowed body. It is answered, or refused as too long."""
    for word in ("a", " ", "\u0301", "🏳", "\\\\"):
        body = json.dumps({"model": MODEL, "prompt": word * (19_000 // len(json.dumps(word)))}).encode()
        assert server.post(COMPLETIONS, body).status_code in (200, 400)


def test_bodies_that_are_too_large(server):
    refused(server.post(COMPLETIONS, b"x" * 20_001), 413)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for declared in (b"20001", b"9" * 19, b"9" * 400):  # refused before the body is sent
        assert (
            b" 413 " in server.exchange(head + b"Content-Length: " + declared + b"\r\n\r\n")[:20] or len(declared) > 20
        )
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert b" 413 " in server.exchange(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5)[:20]


def test_bytes_that_are_not_http(server):
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, b"GET\r\n\r\n", b"\0" * 1000, b"x" * 40_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000, b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):  # fmt: skip
        answer = server.exchange(data)
        assert answer.startswith(b"HTTP/1.1 4") or answer == b"", (data[:60], answer[:200])
        if answer:
            assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


@settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(max_size=300),
    start=st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n"]),
)
def test_any_bytes(server, data, start):
    with server.raw() as connection:
        connection.sendall(start + data)
        connection.shutdown(1)  # half-closed: this side sends no more
        answer = read_all(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_slow_clients_are_cut_off(server):
    """Slow headers, a slow body, or no bytes at all: one second each, even if bytes arrive often."""
    body_head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    )
    for first, drop, expected in (
        (b"GET /health HTTP/1.1\r\n", b"X-A: b\r\n", b"slow_headers"),
        (body_head, b" ", b"slow_body"),
        (b"", b"", b"slow_headers"),
    ):
        with server.raw() as connection:
            started, answer = time.monotonic(), b""
            connection.sendall(first)
            connection.settimeout(0.1)
            while time.monotonic() - started < 15:
                try:
                    part = connection.recv(65536)
                    answer += part
                    if not part:
                        break
                except TimeoutError:
                    connection.sendall(drop)
                except ConnectionError:
                    break
            assert 0.8 < time.monotonic() - started < 10
            assert answer.startswith(b"HTTP/1.1 408 ") and expected in answer


def test_a_client_that_never_reads_its_answer(server):
    """Pipelined requests whose answers are not read: the connection is closed."""
    with server.raw() as connection:
        connection.setsockopt(1, 8, 2048)  # SOL_SOCKET, SO_RCVBUF: a small receive buffer
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.settimeout(15)
        with pytest.raises((ConnectionError, TimeoutError)) as caught:
            while True:
                connection.sendall(request * 100)
        assert not isinstance(caught.value, TimeoutError)


def test_hundreds_of_idle_connections(server):
    """Connections above the limit are refused. The others are closed when their time is up."""
    idle = [server.raw() for _ in range(299)]
    assert server.get("/health").status_code == 200
    extra = [server.raw() for _ in range(30)]
    refusals = [read_all(connection) for connection in extra]
    assert sum(b"too_many_connections" in refusal for refusal in refusals) >= 1
    assert all(b"too_many_connections" in answer or b"slow_headers" in answer for answer in refusals)
    answers = [read_all(connection) for connection in idle]  # all are closed after a second
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
    for connection in (*idle, *extra):
        connection.close()


def test_clients_that_disconnect_at_any_point(server):
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 100, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    request = head % len(body) + body
    for cut in range(0, len(request) + 1, 7):
        with server.raw() as connection:
            connection.sendall(request[:cut])
            if cut % 2:
                connection.shutdown(1)
            if cut % 3 == 0:  # with a reset
                connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_answers_conform_to_the_openapi_description(server, path, mode):
    """Schemathesis makes requests that the description allows, and others that it forbids.

    A request that the description allows may still be refused: the answer can be too long, or the chat
    template can refuse the messages. So acceptance is not checked.
    """
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = api[path]["POST"]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case):
        answer = case.call(timeout=30)
        if answer.status_code != 413:  # unknown fields that are null are allowed, so a body can be large
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    call()
