"""Requests for text: they become jobs of the engine, and the jobs' text becomes answers.

Each answer to a prompt of a request is a job. A job ends when the engine finishes it, when its time is up, or when its
client disconnects. In the last two cases it is cancelled, and its row is free within one step of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lockkit.errors import first_line
from lockkit.generate import Sampling, sampling_defaults
from lockkit.serve.answers import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ModelCard,
    Usage,
)
from lockkit.serve.config import ServeConfig
from lockkit.serve.engine import Engine, Job, Piece, QueueFullError
from lockkit.serve.guard import JOBS
from lockkit.serve.logprobs import LogprobRecorder
from lockkit.serve.protocol import ApiError, ChatRequest, CompletionRequest
from lockkit.serve.stream import EventStream

if TYPE_CHECKING:
    from fastapi import Request
    from pydantic import BaseModel
    from starlette.types import Receive

    from lockkit.serve.model import ServedModel

_MakeChoice = Callable[[Piece], dict[str, Any]]  # a piece of text -> the choice of a chunk
_DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's API


class Service:
    """Answers requests with one model.

    Args:
        model: the export.
        engine: of this export.
        config: limits and the model's name in requests.
    """

    def __init__(self, model: ServedModel, engine: Engine, config: ServeConfig):
        self._model, self._engine, self._config = model, engine, config
        # What a request does not set: as in generation_config.json, else as in OpenAI's API.
        self._sampling = {"temperature": 1.0} | sampling_defaults(model.folder)
        self.name = config.name or model.folder.resolve().name
        self._created = int(time.time())

    @property
    def card(self) -> ModelCard:
        """The served model."""
        return ModelCard(id=self.name, created=self._created)

    def check_model(self, name: str) -> None:
        """Check the name of the model in a request.

        Raises:
            ApiError: it is not the served model.
        """
        if name != self.name:
            raise ApiError(404, f"this server has one model, {self.name!r}", "model", "model_not_found")

    async def complete(self, body: CompletionRequest, request: Request) -> Any:
        """Continue the prompts of a request.

        Raises:
            ApiError: the request is refused or fails.
        """
        self.check_model(body.model)
        self._check_count(len(body.prompt), body.n or 1)
        prompts = [
            prompt if isinstance(prompt, list) else await asyncio.to_thread(self._encode, prompt)
            for prompt in body.prompt
        ]
        jobs, logprobs = self._submit(body, prompts, "prompt", body.max_tokens, _DEFAULT_COMPLETION_TOKENS, request)
        envelope = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            envelope["object"] = "text_completion"

            def choice(piece: Piece) -> dict[str, Any]:
                found = _plain(logprobs.completion(piece.index, piece.text, piece.reason))
                return {"index": piece.index, "text": piece.text, "logprobs": found, "finish_reason": piece.reason}

            return self._stream(jobs, envelope, choice, body.include_usage)
        answers = await self._answers(jobs, request)
        choices = [
            CompletionChoice(
                index=index, text=text, logprobs=logprobs.completion(index, text, reason), finish_reason=reason
            )
            for index, (text, reason) in enumerate(answers)
        ]
        return Completion(**envelope, choices=choices, usage=_usage(jobs))

    async def chat(self, body: ChatRequest, request: Request) -> Any:
        """Answer the conversation of a request.

        Raises:
            ApiError: the request is refused or fails.
        """
        self.check_model(body.model)
        if self._model.chat_problem:
            raise ApiError(400, f"{self._model.chat_problem}: use /v1/completions", code="no_chat_template")
        prompt = await asyncio.to_thread(self._encode_chat, body)
        wanted = body.max_completion_tokens or body.max_tokens
        self._check_count(1, body.n or 1)
        jobs, logprobs = self._submit(body, [prompt], "messages", wanted, self._config.max_output_tokens, request)
        envelope = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            envelope["object"] = "chat.completion.chunk"
            role = {"role": "assistant", "content": ""}
            opening = [{"index": job.index, "delta": role, "logprobs": None, "finish_reason": None} for job in jobs]

            def choice(piece: Piece) -> dict[str, Any]:
                found = _plain(logprobs.chat(piece.index, piece.text, piece.reason))
                delta = {"content": piece.text} if piece.text else {}
                return {"index": piece.index, "delta": delta, "logprobs": found, "finish_reason": piece.reason}

            return self._stream(jobs, envelope, choice, body.include_usage, opening)
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=text),
                logprobs=logprobs.chat(index, text, reason),
                finish_reason=reason,
            )
            for index, (text, reason) in enumerate(await self._answers(jobs, request))
        ]
        return ChatCompletion(**envelope, choices=choices, usage=_usage(jobs))

    def _check_count(self, prompts: int, answers: int) -> None:
        most = self._config.max_batch + self._config.max_queue
        if prompts > most:
            raise ApiError(400, f"prompt has {prompts} prompts, and this server takes {most} in a request", "prompt")
        if prompts * answers > most:
            message = f"n asks for {prompts * answers} answers, and this server gives {most} to a request"
            raise ApiError(400, message, "n")

    def _encode(self, prompt: str) -> list[int]:
        try:
            return self._model.encode(prompt)
        except Exception as error:  # the tokenizer has no token for a character, and none for unknown characters
            raise ApiError(400, f"prompt: the tokenizer refuses this text ({first_line(error)})", "prompt") from error

    def _encode_chat(self, body: ChatRequest) -> list[int]:
        try:
            return self._model.encode_chat([message.plain() for message in body.messages])
        except Exception as error:  # a template is a program, and may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            message = f"the model's chat template refuses these messages ({reason})"
            raise ApiError(400, message, "messages") from error

    def _submit(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        param: str,
        wanted: int | None,
        default: int,
        request: Request,
    ) -> tuple[list[Job], _Logprobs]:
        """Check all prompts against the server's limits and the model, and queue their jobs.

        Args:
            body: the request, for its sampling settings.
            prompts: token ids of each.
            param: name of the field with the prompts, for messages.
            wanted: tokens that the request asks for; None for `default`.
            request: gets the jobs, for the log.

        Returns:
            The jobs, `n` for each prompt, and the log probabilities of their answers.
        """
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        stop_ids, top = self._model.stop_ids(body.stop), body.wanted_logprobs
        sampling, count = Sampling(**self._sampling | body.sampling), body.n or 1
        jobs: list[Job] = []
        recorders: list[LogprobRecorder] = []
        for prompt in prompts:
            tokens, room = self._check_prompt(prompt, param, wanted)
            for number in range(count):
                if top is not None:
                    ends = self._model.end_ids | stop_ids
                    recorders.append(LogprobRecorder(self._model.fast_tokenizer, top, ends))
                job = Job(
                    prompt=tokens,
                    max_tokens=wanted or min(default, room),
                    sampling=sampling,
                    on_token=recorders[-1].add if recorders else None,
                    # Answers to one prompt must differ; the first is that of a request for one.
                    seed=None if body.seed is None else (body.seed + number) % 2**63,
                    stops=body.stop,
                    stop_ids=stop_ids,
                    index=len(jobs),
                    counts_prompt=number == 0,
                    pieces=pieces,
                )
                jobs.append(job)
        try:
            self._engine.submit(*jobs)
        except QueueFullError:
            raise ApiError(429, "too many requests are waiting: try again later", code="queue_full") from None
        request.scope[JOBS].extend(jobs)
        return jobs, _Logprobs(recorders)

    def _check_prompt(self, prompt: list[int], param: str, wanted: int | None) -> tuple[list[int], int]:
        """Return the tokens of a prompt, which are not empty, and the most tokens that its answer can have."""
        limits, model = self._config, self._model
        if not prompt:
            if model.start_id is None:
                raise ApiError(400, "this model needs a prompt that is not empty", param)
            prompt = [model.start_id]
        highest = max(prompt)
        if highest >= model.vocabulary:
            raise ApiError(
                400,
                f"{param}: this model has no embedding for {model.describe_token(highest)}: its token ids "
                f"go up to {model.vocabulary - 1}",
                param,
            )
        if len(prompt) > limits.max_prompt_tokens:
            message = f"{param}: {len(prompt)} tokens, this server takes {limits.max_prompt_tokens}"
            raise ApiError(400, message, param, "context_length_exceeded")
        room = limits.max_output_tokens
        if model.context is not None:
            room = min(room, model.context - len(prompt))
        if room < 1 or (wanted or 0) > room:
            message = f"max_tokens: a prompt of {len(prompt)} tokens leaves room for {max(room, 0)}, not {wanted or 1}"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        return prompt, room

    async def _answers(self, jobs: list[Job], request: Request) -> list[tuple[str, Literal["stop", "length"]]]:
        """Wait for the whole answers; return the text of each and why it ended."""
        texts, reasons = [""] * len(jobs), ["length"] * len(jobs)
        async with self._watch(jobs, request.receive):
            async for piece in _pieces(jobs):
                texts[piece.index] += piece.text
                error = _failure(piece, self._config)
                if error:
                    raise error
                if piece.reason is not None:
                    reasons[piece.index] = piece.reason
        return [(text, "stop" if reason == "stop" else "length") for text, reason in zip(texts, reasons, strict=True)]

    def _stream(
        self,
        jobs: list[Job],
        envelope: dict[str, Any],
        choice: _MakeChoice,
        include_usage: bool,
        opening: Sequence[dict[str, Any]] = (),
    ) -> EventStream:
        """The answers as chunks. A chunk has all the text of an answer that came while the last one was sent."""

        async def chunks(receive: Receive) -> AsyncGenerator[dict[str, Any], None]:
            extra = {"usage": None} if include_usage else {}
            for first in opening:
                yield envelope | {"choices": [first]} | extra
            async with self._watch(jobs, receive):
                async for piece in _pieces(jobs):
                    error = _failure(piece, self._config)
                    if error:
                        raise error
                    yield envelope | {"choices": [choice(piece)]} | extra
            if include_usage:
                yield envelope | {"choices": [], "usage": _usage(jobs).model_dump()}

        return EventStream(chunks)

    @contextlib.asynccontextmanager
    async def _watch(self, jobs: list[Job], receive: Receive) -> AsyncIterator[None]:
        """Cancel the jobs when their time is up, when their client disconnects, and at the end of the block."""

        def cancel(reason: Literal["cancelled", "timeout"]) -> None:
            for job in jobs:
                self._engine.cancel(job, reason)

        def on_disconnect(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                cancel("cancelled")

        loop = asyncio.get_running_loop()
        seconds_left = self._config.request_seconds - (time.perf_counter() - jobs[0].created)
        timer = loop.call_later(max(seconds_left, 0), cancel, "timeout")
        watcher = loop.create_task(_wait_for_disconnect(receive))
        watcher.add_done_callback(on_disconnect)
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            cancel("cancelled")


class _Logprobs:
    """The log probabilities of all answers of a request, piece by piece.

    Args:
        recorders: one per answer; none if the request does not want log probabilities.
    """

    def __init__(self, recorders: list[LogprobRecorder]):
        self._recorders, self._characters = recorders, [0] * len(recorders)

    def completion(self, index: int, text: str, reason: str | None) -> CompletionLogprobs | None:
        """Those of the next text of an answer, in the form of /v1/completions."""
        return self._recorders[index].completion(self._advance(index, text, reason)) if self._recorders else None

    def chat(self, index: int, text: str, reason: str | None) -> ChatLogprobs | None:
        """Those of the next text of an answer, in the form of /v1/chat/completions."""
        return self._recorders[index].chat(self._advance(index, text, reason)) if self._recorders else None

    def _advance(self, index: int, text: str, reason: str | None) -> int | None:
        """Characters of an answer so far; None if all its tokens count: no stop string cut it."""
        self._characters[index] += len(text)
        return None if reason == "length" else self._characters[index]


def _plain(found: BaseModel | None) -> dict[str, Any] | None:
    return None if found is None else found.model_dump()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pieces(jobs: list[Job]) -> AsyncIterator[Piece]:
    """Yield the pieces of all answers, each up to its last. Pieces of an answer that are ready together are joined."""
    queue = jobs[0].pieces
    ended: set[int] = set()
    while len(ended) < len(jobs):
        ready = [await queue.get()]
        while not queue.empty():
            ready.append(queue.get_nowait())
        joined: dict[int, Piece] = {}
        for piece in ready:
            if piece.index in ended:  # it was cancelled while its last piece was on the way
                continue
            if piece.index in joined:
                piece = Piece(joined[piece.index].text + piece.text, piece.reason, piece.index)
            joined[piece.index] = piece
            if piece.reason is not None:
                ended.add(piece.index)
        for piece in joined.values():
            yield piece


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


def _usage(jobs: list[Job]) -> Usage:
    prompt = sum(len(job.prompt) for job in jobs if job.counts_prompt)
    answer = sum(job.generated for job in jobs)
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)
