"""The process: one socket, one event loop, one engine thread.

uvicorn implements HTTP. This module adds limits on slow and hostile clients. A connection has
`read_seconds` to send the headers of its next request, and as long to read a part of the answer. There
are at most `max_connections` connections. The limit on open files is raised above that, so that one more
connection can always be accepted and refused with a reason.
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
from typing import TextIO, cast

import h11
import psutil
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lockkit.errors import UsageError
from lockkit.files import check_output_file, readable_disk_errors
from lockkit.serve.app import make_app
from lockkit.serve.batch import open_rows
from lockkit.serve.config import ServeConfig
from lockkit.serve.engine import Engine
from lockkit.serve.model import open_served_model, warn_about_chat
from lockkit.serve.prometheus import Metrics
from lockkit.serve.protocol import error_body
from lockkit.settings import option_of

log = logging.getLogger(__name__)
_BACKLOG = 1024  # connections that wait to be accepted; all of them may be accepted at once
_OTHER_FILES = 128  # open files of the process that are no connections


def serve_export(
    folder: Path | str,
    config: ServeConfig | None = None,
    on_ready: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve an export until SIGINT or SIGTERM.

    After the first signal no new request is accepted, and running requests get `shutdown_seconds` to
    finish. A second SIGINT ends them. The process's soft limit on open files is raised as
    `max_connections` needs.

    Args:
        folder: folder that `lockkit export` wrote.
        config: see `ServeConfig`.
        on_ready: called once the server listens, with one line that says where.

    Raises:
        UsageError: the export differs from its manifest or cannot be loaded, the server cannot listen on
            the address, the limit on open files is too low, or the caches do not fit into memory.
    """
    config = config or ServeConfig()
    _allow_open_files(config.max_connections)
    with _listen(config) as listener:
        app = open_app(folder, config)
        server = _Server(_uvicorn_config(app, config))
        # The engine needs the interpreter lock briefly after every step. The default interval, 5 ms, is too long.
        sys.setswitchinterval(0.0005)
        server.on_started = lambda: on_ready(_ready_line(app, listener))
        asyncio.run(server.serve(sockets=[listener]))


def open_app(folder: Path | str, config: ServeConfig | None = None) -> FastAPI:
    """The server as an ASGI application, for other servers, for instance Ray Serve.

    The other server must then limit slow headers and idle connections.

    Raises:
        UsageError: see `serve_export`.
    """
    config = config or ServeConfig()
    api_key = config.read_api_key()
    request_log = _open_log(config.request_log)
    model = open_served_model(Path(folder))
    warn_about_chat(model)
    _warn_about_context(model.context, config)
    capacity = config.max_prompt_tokens + config.max_output_tokens
    rows = open_rows(
        model,
        config.max_batch,
        min(capacity, model.context or capacity),
        config.provider,
        config.threads or _spare_cores(),
        not config.no_cuda_graphs,
    )
    metrics = Metrics()
    engine = Engine(rows, model.fast_tokenizer, model.end_ids, config.max_batch, config.max_queue, metrics)
    app = make_app(model, engine, config, api_key, metrics, request_log)
    app.state.cache_bytes, app.state.has_key = rows.cache_bytes, api_key is not None
    return app


def _warn_about_context(context: int | None, config: ServeConfig) -> None:
    """Log a warning for a limit that somebody set higher than the model allows."""
    for name in ("max_prompt_tokens", "max_output_tokens"):
        if context is not None and name in config.model_fields_set and getattr(config, name) > context:
            log.warning(
                "%s is more than the model's context, %s tokens, which is the limit",
                option_of(ServeConfig, name),
                context,
            )


def _open_log(path: Path | None) -> TextIO | None:
    """The request log, each line of which is written at once."""
    if path is None:
        return None
    check_output_file(path, "--request-log")
    with readable_disk_errors(path, "--request-log"):
        return path.open("a", buffering=1, encoding="utf-8")


def _spare_cores() -> int:
    """All physical cores except one. That one is for HTTP, tokenizing and sampling.

    onnxruntime's idle threads spin. With both of two cores for onnxruntime, 16 clients got half the throughput.
    """
    return max(1, (psutil.cpu_count(logical=False) or 2) - 1)


def _allow_open_files(connections: int) -> None:
    """Raise this process's limit on open files. A connection needs one, even to be refused."""
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


def _ready_line(app: FastAPI, listener: socket.socket) -> str:
    """Where the server listens, and whether it needs a key."""
    host, port = listener.getsockname()[:2]
    key = "with an API key" if app.state.has_key else "without an API key"
    if not app.state.has_key and host not in ("127.0.0.1", "::1"):
        key += ", OPEN TO EVERYONE: give --api-key-file"
    host = f"[{host}]" if ":" in host else host
    caches = f"up to {app.state.cache_bytes / 1e9:.2f} GB of caches"
    return f"serving {app.state.name} at http://{host}:{port}/v1 ({key}; {caches}); Ctrl-C stops"


@contextlib.contextmanager
def _listen(config: ServeConfig) -> Iterator[socket.socket]:
    """Open the listening socket. This comes before the model is loaded, since it can fail."""
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


class _Config(uvicorn.Config):
    """uvicorn's settings, and lockkit's for `_Protocol`."""

    limits: ServeConfig


def _uvicorn_config(app: FastAPI, config: ServeConfig) -> _Config:
    # uvicorn's log would contain a line for every request, and a warning for every malformed one.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    settings = _Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        # uvicorn declares these two as int, but passes them on to asyncio, which takes fractions.
        timeout_keep_alive=cast(int, config.read_seconds),
        timeout_graceful_shutdown=cast(int, config.shutdown_seconds),
        h11_max_incomplete_event_size=16_384,  # bytes of headers
    )
    settings.limits = config
    return settings


class _Server(uvicorn.Server):
    """uvicorn's server. After a signal, it returns and does not raise the signal again."""

    on_started: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


class _Protocol(H11Protocol):
    """One connection, with time limits on reading and writing."""

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    @property
    def _limits(self) -> ServeConfig:
        assert isinstance(self.config, _Config)  # made by `_uvicorn_config`
        return self.config.limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called for any unsent byte
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
            self._header_timer = self.loop.call_later(self._limits.read_seconds, self._refuse_slow_headers)

    def _refuse_slow_headers(self) -> None:
        seconds = self._limits.read_seconds
        self._refuse(408, f"the headers did not come within {seconds:g} seconds", "slow_headers")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Send an error that belongs to no request, if HTTP still allows an answer, and close the connection."""
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
