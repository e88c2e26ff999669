"""Checks that every request passes before its endpoint.

Before that, the path and the method get a plain form (`_plain`).

1. The API key, if the server has one. Every path but /health needs it.
2. The body: at most `max_body_bytes`, complete within `read_seconds`. It is read completely here, so
   that an endpoint never waits for a slow client.
3. With `--request-log`, one line for each request, without anything that the client wrote.
4. An unexpected error in an endpoint becomes a response 500 of one line. Only the class and the place
   of the error are logged, since its text may quote a prompt.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from starlette.responses import JSONResponse

from lockkit.serve.config import ServeConfig
from lockkit.serve.prometheus import Metrics
from lockkit.serve.protocol import ApiError

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from lockkit.serve.engine import Job

log = logging.getLogger(__name__)
JOBS = "lockkit.jobs"  # in the scope of a request: the engine's jobs for it
_OPEN_PATH = "/health"  # needs no API key
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json")


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        config: limits on the body.
        api_key: required of every request except /health; None for no key.
        metrics: counts every request.
        request_log: gets a line for every request; None for no log.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        api_key: SecretStr | None,
        metrics: Metrics,
        request_log: TextIO | None = None,
    ):
        self._app, self._config, self._key, self._metrics = app, config, api_key, metrics
        self._log = request_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, pass it on, and count it (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope = {**_plain(scope), JOBS: []}

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read_body(scope, receive)
            await self._app(scope, _replay(body, receive), counted_send)
        except _ClientGoneError:
            pass
        except ApiError as error:
            await refusal(error)(scope, receive, counted_send)
        except Exception as error:
            log.error("%s in %s", type(error).__name__, _place(error))
            if status:  # a part of the answer is sent, so it can only be cut off
                raise asyncio.CancelledError from None
            await refusal(ApiError(500, "the server failed on this request"))(scope, receive, counted_send)
        finally:
            endpoint = next((path for path in ENDPOINTS if f"{scope['path']}/".startswith(f"{path}/")), "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            seconds = time.perf_counter() - started
            self._metrics.request_seconds.labels(endpoint).observe(seconds)
            if self._log is not None:
                self._log.write(_log_line(endpoint, status, seconds, scope[JOBS]))

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] == _OPEN_PATH:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        expected = self._key.get_secret_value().encode("ascii")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), expected):
            raise ApiError(401, "give the API key in the header `Authorization: Bearer KEY`", code="invalid_api_key")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._config.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than this server's limit of {limit} bytes", code="body_too_large"
        )
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            seconds = self._config.read_seconds
            raise ApiError(408, f"the body did not come within {seconds:g} seconds", code="slow_body") from None


def _log_line(endpoint: str, status: int, seconds: float, jobs: list[Job]) -> str:
    """A line of the request log. The status is 0 if the client left before an answer began."""
    fields = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "endpoint": endpoint,
        "status": status,
        "seconds": round(seconds, 4),
        "answers": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs if job.counts_prompt),
        "completion_tokens": sum(job.generated for job in jobs),
    }
    return json.dumps(fields) + "\n"


def _plain(scope: Scope) -> Scope:
    """A request in the form that the endpoints know.

    Clients that join a base URL and a path write `/v1//models` or `/v1/models/`. HEAD is GET without the body,
    which uvicorn leaves out.
    """
    path = re.sub("/+", "/", scope["path"]).removesuffix("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "method": method}


class _ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


def refusal(error: ApiError) -> JSONResponse:
    """The response to a refused request. It closes the connection if the body may be unread."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 429:
        headers["Retry-After"] = "1"
    if error.status in (401, 408, 413):
        headers["Connection"] = "close"
    if error.status == 408:
        headers["X-Should-Retry"] = "false"  # otherwise OpenAI's clients repeat the request
    return JSONResponse(error.body(), error.status, headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first and then what `receive` returns: that the client disconnects."""
    returned = False

    async def replayed() -> Message:
        nonlocal returned
        if not returned:
            returned = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


def _place(error: BaseException) -> str:
    """File and line where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
