"""The endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

A request for text becomes a job of the engine. A job ends when the engine finishes it, when its time
is up, or when its client disconnects. In the last two cases it is cancelled, and its row is free
within one step of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lockkit.serve.config import ServeConfig
from lockkit.serve.engine import Engine, Job, Piece, QueueFullError
from lockkit.serve.guard import Guard, refusal
from lockkit.serve.prometheus import Metrics
from lockkit.serve.protocol import (
    ApiError,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Usage,
)
from lockkit.serve.stream import EventStream
from lockkit.version import __version__

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.types import Receive

    from lockkit.serve.model import ServedModel

_MakeChoice = Callable[[str, str | None], dict[str, Any]]  # text and finish reason of a chunk -> its choice
_REFUSALS = {
    400: "The request is malformed, or asks for something that this server does not support.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body or the answer took too long.",
    413: "The body is too large.",
    429: "Too many requests are waiting.",
}
_DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's API


def make_app(
    model: ServedModel, engine: Engine, config: ServeConfig, api_key: SecretStr | None, metrics: Metrics
) -> FastAPI:
    """Make the ASGI application for one model. The engine starts and stops with it.

    Args:
        model: the export.
        engine: of this export; not started yet.
        config: limits and the model's name in requests.
        api_key: required of every request except /health; None for no key.
        metrics: filled by every request.
    """
    service = _Service(model, engine, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(
        title="lockkit serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={status: {"model": ErrorResponse, "description": text} for status, text in _REFUSALS.items()},
    )  # fmt: skip
    app.state.name = service.name
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)

    @app.get("/health")
    async def health() -> Health:
        """Whether the server can answer. Needs no API key."""
        if not engine.alive:
            raise ApiError(500, "the engine has stopped")
        return Health(fused_kernel=engine.fused)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that this server has; there is only one."""
        return ModelList(data=[ModelCard(id=service.name, created=service.created)])

    @app.post("/v1/completions", response_model=Completion, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue a prompt."""
        return await service.complete(body, request)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation. The model must have a chat template."""
        return await service.chat(body, request)

    # FastAPI documents this assignment as the way to change the description.
    app.openapi = lambda: _openapi(app, service.name, api_key is not None)  # type: ignore[method-assign]
    app.add_middleware(Guard, config=config, api_key=api_key, metrics=metrics)
    return app


_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # JSON, or [DONE]
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


class _Service:
    """Turns requests into jobs of the engine, and their text into answers."""

    def __init__(self, model: ServedModel, engine: Engine, config: ServeConfig):
        self._model, self._engine, self._config = model, engine, config
        self.name = config.name or model.folder.resolve().name
        self.created = int(time.time())

    async def complete(self, body: CompletionRequest, request: Request) -> Any:
        self._check_model(body.model)
        if isinstance(body.prompt, str):
            prompt = await asyncio.to_thread(self._model.encode, body.prompt)
        else:
            prompt = body.prompt
            if any(token >= self._model.vocabulary for token in prompt):
                raise ApiError(400, f"prompt: token ids go up to {self._model.vocabulary - 1}", "prompt")
        job = self._submit(body, prompt, "prompt", body.max_tokens, _DEFAULT_COMPLETION_TOKENS)
        envelope = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            envelope["object"] = "text_completion"

            def choice(text: str, reason: str | None) -> dict[str, Any]:
                return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

            return self._stream(job, envelope, choice, body.include_usage)
        text, reason = await self._answer(job, request)
        return Completion(**envelope, choices=[CompletionChoice(text=text, finish_reason=reason)], usage=_usage(job))

    async def chat(self, body: ChatRequest, request: Request) -> Any:
        self._check_model(body.model)
        if not self._model.has_chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        prompt = await asyncio.to_thread(self._encode_chat, body)
        wanted = body.max_completion_tokens or body.max_tokens
        job = self._submit(body, prompt, "messages", wanted, self._config.max_output_tokens)
        envelope = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            envelope["object"] = "chat.completion.chunk"
            opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

            def choice(text: str, reason: str | None) -> dict[str, Any]:
                return {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}

            return self._stream(job, envelope, choice, body.include_usage, opening)
        text, reason = await self._answer(job, request)
        message = AssistantMessage(content=text)
        choices = [ChatChoice(message=message, finish_reason=reason)]
        return ChatCompletion(**envelope, choices=choices, usage=_usage(job))

    def _encode_chat(self, body: ChatRequest) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self._model.encode_chat([message.plain() for message in body.messages])
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"this server has one model, {self.name!r}", "model", "model_not_found")

    def _submit(
        self, body: CompletionRequest | ChatRequest, prompt: list[int], param: str, wanted: int | None, default: int
    ) -> Job:
        """Check lengths against the server's limits and the model's context, and queue the job.

        Args:
            body: the request, for its sampling settings.
            prompt: token ids.
            param: name of the field with the prompt, for messages.
            wanted: tokens that the request asks for; None for `default`.
        """
        limits, context = self._config, self._model.context
        if not prompt:
            if self._model.start_id is None:
                raise ApiError(400, "this model needs a prompt that is not empty", param)
            prompt = [self._model.start_id]
        if len(prompt) > limits.max_prompt_tokens:
            message = f"{param}: {len(prompt)} tokens, this server takes {limits.max_prompt_tokens}"
            raise ApiError(400, message, param, "context_length_exceeded")
        room = limits.max_output_tokens if context is None else min(limits.max_output_tokens, context - len(prompt))
        if room < 1 or (wanted or 0) > room:
            message = f"max_tokens: a prompt of {len(prompt)} tokens leaves room for {max(room, 0)}, not {wanted or 1}"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        job = Job(
            prompt=prompt,
            max_tokens=wanted or min(default, room),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stops=body.stops,
        )
        try:
            self._engine.submit(job)
        except QueueFullError:
            raise ApiError(429, "too many requests are waiting: try again later", code="queue_full") from None
        return job

    async def _answer(self, job: Job, request: Request) -> tuple[str, Literal["stop", "length"]]:
        """Wait for the whole answer; return its text and why it ended."""
        parts = []
        async with self._watch(job, request.receive):
            async for piece in _pieces(job):
                parts.append(piece.text)
        error = _failure(piece, self._config)
        if error:
            raise error
        assert piece.reason == "stop" or piece.reason == "length"  # the last piece has a reason; others are failures
        return "".join(parts), piece.reason

    def _stream(
        self,
        job: Job,
        envelope: dict[str, Any],
        choice: _MakeChoice,
        include_usage: bool,
        opening: dict[str, Any] | None = None,
    ) -> EventStream:
        """The answer as chunks. A chunk has all the text that was generated while the last one was sent."""

        async def chunks(receive: Receive) -> AsyncGenerator[dict[str, Any], None]:
            extra = {"usage": None} if include_usage else {}
            if opening:
                yield envelope | {"choices": [opening]} | extra
            async with self._watch(job, receive):
                async for piece in _pieces(job):
                    error = _failure(piece, self._config)
                    if error:
                        raise error
                    yield envelope | {"choices": [choice(piece.text, piece.reason)]} | extra
            if include_usage:
                yield envelope | {"choices": [], "usage": _usage(job).model_dump()}

        return EventStream(chunks)

    @contextlib.asynccontextmanager
    async def _watch(self, job: Job, receive: Receive) -> AsyncIterator[None]:
        """Cancel the job when its time is up, when its client disconnects, and at the end of the block."""

        def on_disconnect(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                self._engine.cancel(job, "cancelled")

        loop = asyncio.get_running_loop()
        seconds_left = self._config.request_seconds - (time.perf_counter() - job.created)
        timer = loop.call_later(max(seconds_left, 0), self._engine.cancel, job, "timeout")
        watcher = loop.create_task(_wait_for_disconnect(receive))
        watcher.add_done_callback(on_disconnect)
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            self._engine.cancel(job, "cancelled")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pieces(job: Job) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer up to the last. Pieces that are ready together are joined."""
    while True:
        piece = await job.pieces.get()
        while piece.reason is None and not job.pieces.empty():
            more = job.pieces.get_nowait()
            piece = Piece(piece.text + more.text, more.reason)
        yield piece
        if piece.reason is not None:
            return


def _failure(piece: Piece, config: ServeConfig) -> ApiError | None:
    if piece.reason == "timeout":
        message = f"the answer took more than this server's {config.request_seconds:g} seconds"
        return ApiError(408, message, code="request_timeout")
    if piece.reason == "shutdown":
        return ApiError(408, "the server is shutting down", code="shutdown")
    if piece.reason == "cancelled":
        return ApiError(408, "the client disconnected", code="client_left")
    if piece.reason == "error":
        return ApiError(500, "the server failed on this request")
    return None


def _usage(job: Job) -> Usage:
    return Usage(
        prompt_tokens=len(job.prompt),
        completion_tokens=job.generated,
        total_tokens=len(job.prompt) + job.generated,
    )


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)  # registered for this class
    return refusal(error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """One line that says what is wrong with the first invalid field, without quoting its value."""
    assert isinstance(error, RequestValidationError)  # registered for this class
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        return refusal(ApiError(400, "the body is not valid JSON", code="invalid_json"))
    # A field that may have several types gets one error for each type. Their places begin with the field's.
    place, messages = first["loc"][1:], [first["msg"]]
    for other in others:
        if other["loc"][1:2] == place[:1]:
            place = _common_start(place, other["loc"][1:])
            messages.append(other["msg"])
    param = ".".join(map(str, place)) or None
    message = "; or: ".join(dict.fromkeys(messages))
    return refusal(ApiError(400, f"{param or 'the body'}: {message}", param, first["type"]))


def _common_start(first: tuple[int | str, ...], second: tuple[int | str, ...]) -> tuple[int | str, ...]:
    same = [one for one, other in zip(first, second, strict=False) if one == other]
    return first[: len(same)] if first[: len(same)] == second[: len(same)] else first[:1]


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # registered for this class
    response = refusal(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})  # `Allow`, if the path does not have this method
    return response


def _openapi(app: FastAPI, name: str, with_key: bool) -> dict[str, Any]:
    """FastAPI's OpenAPI description, corrected.

    The name of the model and the API key are added. The response 422 is removed, because `_invalid`
    answers with 400.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = FastAPI.openapi(app)  # kept by FastAPI in `app.openapi_schema`
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    for request in ("CompletionRequest", "ChatRequest"):
        schema["components"]["schemas"][request]["properties"]["model"]["enum"] = [name]
    if with_key:
        schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"bearer": []}]
        schema["paths"]["/health"]["get"]["security"] = []
    return schema
