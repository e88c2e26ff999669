"""Continuous batching: one thread that runs the graph for all requests.

One iteration of its loop:

1. Remove the jobs that were cancelled. Their rows are free at once.
2. While rows are free, take the next job from the queue and run its prompt. At most
   `PREFILL_TOKENS` prompt tokens run in one iteration, so that a long prompt does not delay the others.
3. Run one token for every row in use, choose each row's next token, and send the text.

The thread holds no lock while it computes. Text reaches a client through its job's `pieces`, an
asyncio queue of the server's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lockkit.generate import Sampling
from lockkit.serve.batch import PREFILL_TOKENS, Rows
from lockkit.text_stream import TextStream, byte_tokens

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from lockkit.serve.prometheus import Metrics

log = logging.getLogger(__name__)
Reason = Literal["stop", "length", "cancelled", "timeout", "shutdown", "error"]


class QueueFullError(Exception):
    """There are not enough free rows and places in the queue."""


@dataclass(frozen=True)
class Piece:
    """The next text of a job's answer. The last piece has a reason. `index` is the job's."""

    text: str
    reason: Reason | None = None
    index: int = 0


@dataclass(eq=False)
class Job:
    """One prompt: what to generate, and the queue for its text.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most tokens to generate.
        sampling: how tokens are chosen.
        on_token: called in the engine's thread with the logits, `[vocab]`, and the token that was chosen by them.
        seed: of the sampling; None for a random one.
        stops: strings that end the answer.
        stop_ids: tokens that end this answer, with those that end every answer.
        index: number of the answer in its request, from 0.
        counts_prompt: whether its prompt is counted; not for further answers to the same prompt.
        pieces: the text, to be read in the event loop. The jobs of a request share one queue.
        generated: tokens so far, including the one that ended the text.
        done: nothing more is computed for this job.
        created: time of creation, as `time.perf_counter` gives it, in seconds.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    on_token: Callable[[torch.Tensor, int], None] | None = None
    seed: int | None = None
    stops: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    index: int = 0
    counts_prompt: bool = True
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    generated: int = 0
    done: bool = False
    created: float = field(default_factory=time.perf_counter)
    # Used by the engine only:
    computed: int = 0  # tokens of the prompt that have been run
    length: int = 0  # tokens in the row
    token: int = 0  # the newest token, not run yet
    stream: TextStream | None = None  # set when the prompt has been run
    random: torch.Generator | None = None  # set when the prompt has been run, unless the most likely token is taken
    tokens: list[int] = field(default_factory=list)  # of the prompt and the answer, if a penalty needs them


class Engine:
    """Runs jobs. Call `start`, `submit`, `cancel` and `stop` from the event loop only.

    Args:
        rows: the graph and its caches.
        tokenizer: turns tokens into text.
        end_ids: tokens that end an answer.
        max_batch: most rows in use at the same time.
        max_queue: most jobs that wait.
        metrics: filled by the engine.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        max_batch: int,
        max_queue: int,
        metrics: Metrics,
    ):
        metrics.fused_kernel.set(rows.fused)
        self._rows, self._tokenizer, self._end_ids = rows, tokenizer, end_ids
        self._byte_of = byte_tokens(tokenizer.get_vocab(), tokenizer.decode)
        self._max_batch, self._max_queue, self._metrics = max_batch, max_queue, metrics
        self._waiting: deque[Job] = deque()
        self._prefilling: Job | None = None  # the job whose prompt is being run
        self._running: list[Job] = []  # the job of each row in use
        self._outbox: list[tuple[Job, Piece]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lockkit-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Jobs send their text to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def fused(self) -> bool:
        """Whether chains run in the fused operator of `lockkit kernel`."""
        return self._rows.fused

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def submit(self, *jobs: Job) -> None:
        """Queue jobs: all of them, or none.

        Raises:
            QueueFullError: there are not enough free rows and places in the queue.
        """
        with self._changed:
            free = self._max_batch - len(self._running) - (self._prefilling is not None)
            if len(self._waiting) + len(jobs) > self._max_queue + max(0, free):
                raise QueueFullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job, reason: Reason) -> None:
        """End a job now, unless it has ended. Its row becomes free in the next iteration."""
        if not job.done:
            job.done = True
            job.pieces.put_nowait(Piece("", reason, job.index))
            with self._changed:
                self._changed.notify()

    def stop(self) -> None:
        """End the thread. Jobs that have not ended get the reason "shutdown"."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        for job in (*self._waiting, *([self._prefilling] if self._prefilling else []), *self._running):
            self.cancel(job, "shutdown")

    # The methods below run in the engine's thread.

    def _run(self) -> None:
        import torch

        torch.set_num_threads(1)  # PyTorch only samples here; more threads would take cores from onnxruntime
        while self._wait_for_work():
            self._remove_done()
            self._prefill()
            self._decode()
            self._send_pieces()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._stopping or self._waiting or self._prefilling or self._running):
                self._changed.wait()
            return not self._stopping

    def _remove_done(self) -> None:
        with self._changed:
            if any(job.done for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.done)
        if self._prefilling and self._prefilling.done:
            self._prefilling = None
        for row in reversed(range(len(self._running))):
            if self._running[row].done:
                self._free(row)

    def _free(self, row: int) -> None:
        """Move the last row in use here, so that the rows in use stay contiguous from 0."""
        last = len(self._running) - 1
        self._rows.move(last, row, self._running[last].length)
        self._running[row] = self._running[last]
        self._running.pop()

    def _prefill(self) -> None:
        """Run at most `PREFILL_TOKENS` of prompts: several short ones, or a part of a long one."""
        budget = PREFILL_TOKENS
        while budget > 0 and len(self._running) < self._max_batch:
            if self._prefilling is None:
                with self._changed:
                    if not self._waiting:
                        return
                    self._prefilling = self._waiting.popleft()
            job = self._prefilling
            part = job.prompt[job.computed : job.computed + budget]
            try:
                logits = self._rows.prefill(part, job.computed)
                job.computed += len(part)
                budget -= len(part)
                if job.computed < len(job.prompt):
                    return
                self._rows.admit(len(self._running), len(job.prompt))
                self._begin(job)
            except Exception as error:
                self._fail([job], error)
                self._prefilling = None
                continue
            self._prefilling = None
            self._running.append(job)
            self._choose([job], logits[None])
            if job.done:
                self._running.pop()

    def _begin(self, job: Job) -> None:
        import torch

        job.length = len(job.prompt)
        job.stream = TextStream(self._tokenizer.decode, job.prompt, job.stops, self._byte_of)
        if not job.sampling.takes_the_most_likely:
            job.tokens = list(job.prompt)
            seed = secrets.randbits(63) if job.seed is None else job.seed
            job.random = torch.Generator().manual_seed(seed)
        self._metrics.prompt_tokens.inc(len(job.prompt))

    def _decode(self) -> None:
        jobs = list(self._running)
        if not jobs:
            return
        for job in jobs:
            job.length += 1
        try:
            logits = self._rows.decode([job.token for job in jobs], [job.length for job in jobs])
        except Exception as error:
            self._fail(jobs, error)
            self._running.clear()
            return
        self._metrics.batch_size.observe(len(jobs))
        self._choose(jobs, logits)
        for row in reversed(range(len(jobs))):
            if jobs[row].done:
                self._free(row)

    def _choose(self, jobs: list[Job], logits: torch.Tensor) -> None:
        """Choose the next token of each job by its logits, `[jobs, vocab]`."""
        logits = logits.float()
        most_likely = logits.argmax(-1).tolist()
        for row, job in enumerate(jobs):
            try:
                token = most_likely[row]
                if job.random is not None:
                    token = job.sampling.choose(logits[row], job.random, job.tokens)
                    job.tokens.append(token)
                if job.on_token is not None:
                    job.on_token(logits[row], token)
                self._append(job, token)
            except Exception as error:
                self._fail([job], error)

    def _append(self, job: Job, token: int) -> None:
        """Add a token to the answer. Queue its text; end the job if the answer is complete."""
        assert job.stream is not None  # set by `_begin`
        job.token = token
        job.generated += 1
        self._metrics.generated_tokens.inc()
        if job.generated == 1:
            self._metrics.first_token_seconds.observe(time.perf_counter() - job.created)
        if token in self._end_ids or token in job.stop_ids:
            self._end(job, job.stream.flush(), "stop")
            return
        text = job.stream.push(token)
        if job.stream.stopped:
            self._end(job, text, "stop")
        elif job.generated >= job.max_tokens:
            self._end(job, text + job.stream.flush(), "length")
        elif text:
            self._outbox.append((job, Piece(text, index=job.index)))

    def _end(self, job: Job, text: str, reason: Reason) -> None:
        self._outbox.append((job, Piece(text, reason, job.index)))
        job.done = True

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """End jobs that failed. Only the class of the error is logged, since its text may quote a prompt."""
        log.error("%d requests failed in the engine: %s", len(jobs), type(error).__name__)
        for job in jobs:
            if not job.done:
                self._end(job, "", "error")

    def _send_pieces(self) -> None:
        outbox, self._outbox = self._outbox, []
        self._metrics.running.set(len(self._running))
        self._metrics.waiting.set(len(self._waiting))
        if outbox:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so no client waits
                self._loop.call_soon_threadsafe(_deliver, outbox)


def _deliver(outbox: list[tuple[Job, Piece]]) -> None:
    for job, piece in outbox:
        job.pieces.put_nowait(piece)
