"""Thousands of idle connections, on a server that starts with a low limit on open files."""

from __future__ import annotations

import contextlib
import resource
import select
import socket

import psutil
import pytest
from serving import Server, read_all, running_server, tiny_chat_model

from lockkit.export.run import export_model

MODEL = "tiny-onnx"
IDLE, MOST = 2_400, 2_500
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
# What idle connections have sent: nothing, the first half of their headers, or a whole request.
SENT = (b"", HEALTH[:30], HEALTH)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connections")
    export_model(str(tiny_chat_model(folder / "original")), folder / MODEL)
    return folder / MODEL


@pytest.fixture
def many_files():
    """Raise this process's soft limit on open files, for both ends of every connection; return the new limit."""
    needed = MOST + 2_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"needs {needed} open files, and the hard limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield needed
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ask(server: Server) -> str:
    with server.client() as client:
        answer = client.completions.create(model=MODEL, prompt="import os\n", max_tokens=20, temperature=0)
    return answer.choices[0].text


def is_healthy(connection: socket.socket) -> bool:
    """Whether a complete answer of /health arrives with status 200."""
    answer = b""
    while not answer.endswith(b"}") and (part := connection.recv(4096)):
        answer += part
    return answer.startswith(b"HTTP/1.1 200 ")


def open_connections(server: Server) -> int:
    found = psutil.Process(server.process.pid).net_connections()
    return sum(connection.status == psutil.CONN_ESTABLISHED for connection in found)


def closed(connections: list[socket.socket]) -> list[socket.socket]:
    """The connections that the server has written to or closed."""
    poll = select.poll()
    by_number = {connection.fileno(): connection for connection in connections}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(0)]


def test_thousands_of_idle_connections(export, many_files):
    limits = ("--max-connections", MOST, "--read-seconds", 60)
    with running_server(export, *limits, open_files=(256, many_files)) as server, contextlib.ExitStack() as stack:
        alone = ask(server)
        before = server.memory_bytes
        idle = [stack.enter_context(server.raw()) for _ in range(IDLE)]
        for number, connection in enumerate(idle):
            connection.sendall(SENT[number % len(SENT)])
        answered = idle[2 :: len(SENT)]
        assert all(map(is_healthy, answered))
        server.wait_until(lambda: open_connections(server) == IDLE)
        assert server.get("/health").status_code == 200
        assert ask(server) == alone

        # Connections above the limit are refused with a reason. The others are still served.
        extra = [stack.enter_context(server.raw()) for _ in range(2 * (MOST - IDLE))]
        server.wait_until(lambda: len(closed(extra)) >= len(extra) - (MOST - IDLE))
        refusals = [read_all(connection) for connection in closed(extra)]
        assert len(refusals) == len(extra) - (MOST - IDLE)
        assert all(r.startswith(b"HTTP/1.1 429 ") and b"too_many_connections" in r for r in refusals)
        answered[-1].sendall(HEALTH)
        assert is_healthy(answered[-1])
        assert server.memory_bytes - before < 30_000 * MOST  # bytes for each connection

        stack.close()  # all clients disconnect at once
        server.wait_until(lambda: open_connections(server) == 0)
        assert server.get("/health").status_code == 200
        assert ask(server) == alone and server.process.poll() is None


def test_too_low_a_limit_on_open_files_is_reported_at_the_start(export):
    with pytest.raises(AssertionError) as caught, running_server(export, open_files=(512, 512)):
        pass
    message = str(caught.value)
    assert "1024 connections" in message and "limit" in message and "--max-connections" in message
    assert "Traceback" not in message
    with running_server(export, "--max-connections", 100, open_files=(512, 512)) as server:
        assert server.get("/health").status_code == 200
