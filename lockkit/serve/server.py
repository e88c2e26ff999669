"""The process: one socket, one event loop, one engine thread.

uvicorn speaks HTTP. What is added here is about clients that do not play fair: a connection has
`read_seconds` to send the headers of its next request and to make room for more of an answer, and
there are at most `max_connections` of them. For each the process may open a file, so that the next
one can always be accepted, if only to be refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import psutil
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lockkit.errors import UsageError
from lockkit.serve.app import make_app
from lockkit.serve.config import ServeConfig
from lockkit.serve.engine import Engine
from lockkit.serve.metrics import Metrics
from lockkit.serve.model import open_served_model
from lockkit.serve.protocol import error_body
from lockkit.serve.rows import open_rows

_BACKLOG = 1024  # connections that wait to be accepted, and may be accepted at once
_OTHER_FILES = 128  # that the process has open


def serve_export(
    folder: Path | str,
    config: ServeConfig | None = None,
    on_ready: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve an export until SIGINT or SIGTERM.

    On the first signal no new request is taken, and running ones get `shutdown_seconds` to finish;
    a second SIGINT ends them. This process's soft limit on open files is raised to what
    `max_connections` needs.

    Args:
        folder: what `lockkit export` wrote.
        config: see `ServeConfig`.
        on_ready: told, in one line, where the server listens, once it does.

    Raises:
        UsageError: the export is not intact or cannot be loaded, the address cannot be listened
            on, or a setting does not fit.
    """
    config = config or ServeConfig()
    _allow_open_files(config.max_connections)
    with _listen(config) as listener:
        app = open_app(folder, config)
        server = _Server(_uvicorn_config(app, config))
        # The engine needs the interpreter for a moment after every step, and may not wait 5 ms for it.
        sys.setswitchinterval(0.0005)
        server.say_ready = lambda: on_ready(_greeting(app, listener))
        asyncio.run(server.serve(sockets=[listener]))


def open_app(folder: Path | str, config: ServeConfig | None = None) -> FastAPI:
    """The server as an ASGI application, for Ray Serve and the like.

    What it takes to deal with slow headers and idle connections is then the other server's part.

    Raises:
        UsageError: see `serve_export`.
    """
    config = config or ServeConfig()
    api_key = config.read_api_key()
    model = open_served_model(Path(folder))
    capacity = config.max_prompt_tokens + config.max_output_tokens
    rows = open_rows(
        model,
        config.max_batch,
        min(capacity, model.context or capacity),
        config.provider,
        config.threads or _spare_cores(),
    )
    metrics = Metrics()
    engine = Engine(rows, model.fast_tokenizer, model.end_ids, config.max_batch, config.max_queue, metrics)
    app = make_app(model, engine, config, api_key, metrics)
    app.state.cache_bytes, app.state.has_key = rows.cache_bytes, api_key is not None
    return app


def _spare_cores() -> int:
    """All physical cores but one, which HTTP, tokenizing and sampling need: with both of two cores for
    onnxruntime, whose idle threads spin, 16 clients got half the throughput.
    """
    return max(1, (psutil.cpu_count(logical=False) or 2) - 1)


def _allow_open_files(connections: int) -> None:
    """Raise the limit on this process's open files: without a free one, nobody could even be refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{connections} connections need {needed} open files, and this system's hard limit is {hard}: "
            f"change --max-connections, or the limit (ulimit -Hn)"
        )
    wanted = needed + _BACKLOG if hard == resource.RLIM_INFINITY else min(needed + _BACKLOG, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _greeting(app: FastAPI, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    key = "with an API key" if app.state.has_key else "without an API key"
    if not app.state.has_key and host not in ("127.0.0.1", "::1"):
        key += ", OPEN TO EVERYONE: give --api-key-file"
    host = f"[{host}]" if ":" in host else host
    caches = f"up to {app.state.cache_bytes / 1e9:.2f} GB of caches"
    return f"serving {app.state.name} at http://{host}:{port}/v1 ({key}; {caches}); Ctrl-C stops"


@contextlib.contextmanager
def _listen(config: ServeConfig) -> Iterator[socket.socket]:
    """The listening socket, before a model is loaded for nothing."""
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen on {config.host}:{config.port} ({reason}): change --host or --port") from error
    with listener:
        yield listener


def _uvicorn_config(app: Any, config: ServeConfig) -> uvicorn.Config:
    # uvicorn's own log would hold a line for every request and, for a bad one, a warning.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    settings = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=config.read_seconds,
        timeout_graceful_shutdown=config.shutdown_seconds,
        h11_max_incomplete_event_size=16_384,  # of headers
    )
    settings.lockkit = config  # for _Protocol, which uvicorn makes
    return settings


class _Server(uvicorn.Server):
    """uvicorn's server, which ends quietly on a signal instead of sending it to the process again."""

    say_ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.say_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


class _Protocol(H11Protocol):
    """One connection, with limits on what an unfair client can take."""

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    @property
    def _limits(self) -> ServeConfig:
        return self.config.lockkit

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of any byte not taken
        if len(self.connections) > self._limits.max_connections:
            self._refuse(429, "too many connections: try again later", "too_many_connections")
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        elif self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not valid HTTP", "invalid_http")

    def _await_headers(self) -> None:
        if self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(self._limits.read_seconds, self._headers_are_late)

    def _headers_are_late(self) -> None:
        seconds = self._limits.read_seconds
        self._refuse(408, f"the headers did not come within {seconds:g} seconds", "slow_headers")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer outside of any request, where an answer is still possible, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(status, message, code=code)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            with contextlib.suppress(h11.LocalProtocolError):
                for event in (
                    h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
                ):  # fmt: skip
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer:
                timer.cancel()
        self._header_timer = self._write_timer = None
