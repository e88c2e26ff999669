"""A real `lockkit serve` process on a free port of this machine, and clients for it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import psutil
from tiny import save_tiny

# Writes each message after its role, and refuses a conversation that begins with the assistant.
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('an answer comes first') }}{% endif %}"
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CONTEXT = 20_000  # more tokens than any machine computes in the seconds of a test


def tiny_chat_model(folder: Path) -> Path:
    """A tiny Qwen3 with a long context and a chat template."""
    save_tiny("qwen3", folder, seed=5, max_position_embeddings=CONTEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@dataclass
class Server:
    """A running server, and ways to talk to it."""

    process: subprocess.Popen
    port: int
    key: str = "none"
    warnings: str = ""  # what it wrote before it listened

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60, **settings)

    def raw(self) -> socket.socket:
        """A new connection, for bytes that are not HTTP."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def exchange(self, data: bytes) -> bytes:
        """Send bytes; return everything that the server sends until it closes the connection."""
        with self.raw() as connection:
            connection.sendall(data)
            return read_all(connection)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=20)

    def post(self, path: str, body: bytes, **headers: str) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"} | headers
        return httpx2.post(self.url + path, content=body, headers=headers, timeout=60)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} seconds"
            time.sleep(0.05)

    @property
    def memory_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


def read_all(connection: socket.socket) -> bytes:
    """All bytes until the other side closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def running_server(
    export: Path, *options: object, key: str | None = None, open_files: tuple[int, int] | None = None
) -> Iterator[Server]:
    """Start `lockkit serve EXPORT OPTIONS` and wait until it listens. At the end it is killed.

    Args:
        key: its API key, if it has one.
        open_files: its soft and hard limit on open files. Default: those of this process.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"LOCKKIT_API_KEY": key} if key else {})
    command = [sys.executable, "-m", "lockkit", "serve", export, "--port", 0, "--threads", 1, *options]
    if open_files:  # set by a shell, because Python code between fork and exec is unsafe
        soft, hard = open_files
        command = ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", *command]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        warnings = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line := process.stderr.readline())):
            assert line, warnings
            warnings += line
        yield Server(process, int(found[1]), key or "none", warnings)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
