"""Phase 2: all chains together, in place, on the KL divergence to the teacher's logits.

A step, with never more than one decoder layer's activations in memory:

1. Forward, layer by layer: the teacher's stream through the layer with its MLP, the student's
   through the same layer with its chain. Only the student's input of each layer is kept.
2. Loss: KL(teacher || student) of the logits, averaged over tokens (arXiv 2605.10777, phase 2).
3. Backward, layer by layer: run the layer again, this time with gradients, take the step of its
   chain, hand the gradient of its input on. Workers share a batch's rows and add up gradients.

The step size is found first, unless it is given: short trials from phase 1's state with rising
rates, judged by held-out KL, until one does worse than the one before. They are deterministic, so
that a lock killed among them finds the same rate again.

Everything but the chains is frozen. Where the chains, the optimiser and the teacher do not fit
into memory together, each layer's share of them lives on disk between its turns (`ChainStack`).
Several times on the way and at the end, measure held-out KL and perplexity. The lowest KL wins,
among states whose perplexity is no higher than phase 1's or the original's; phase 1's own counts
too, so this phase never makes the lock worse.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from lockkit.errors import DistillationError
from lockkit.files import read_json, write_json
from lockkit.lock.config import LockConfig
from lockkit.lock.meter import FidelityMeter
from lockkit.lock.stack import ChainStack
from lockkit.lock.work import Work
from lockkit.measure.metrics import mean_kl_divergence
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.models.layered import StreamedModel, return_free_memory
from lockkit.progress import Progress
from lockkit.training import shuffled_order
from lockkit.workers import Workers

EVALUATIONS = 4
SAVE_EVERY_SECONDS = 120
MAX_GRADIENT_NORM = 1.0
TRIAL_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01)
TRIAL_SHARE = 1 / 4  # of the steps
SHORTEST_TRIAL = 8  # steps


@dataclass(frozen=True)
class EndToEndResult:
    """What phase 2 reached; `best_step` 0 means that phase 1's state was kept."""

    steps: int
    best_step: int
    tokens: int
    learning_rate: float
    seconds: float
    kl_divergence_before: float
    kl_divergence_after: float
    text: MeasuredText  # that both were measured on

    def record(self) -> dict:
        return vars(self) | {"text": self.text.record()}


@dataclass
class _Position:
    """Where phase 2 stands; saved with every snapshot."""

    step: int
    best_step: int
    best_kl: float
    before_kl: float
    highest_perplexity: float
    learning_rate: float
    seconds: float


class EndToEnd:
    """Phase 2 of one lock.

    Args:
        stream: the teacher.
        stack: the chains as phase 1 left them.
        train: rows of token ids, `[rows, block]`.
        meter: measures on held-out rows.
    """

    def __init__(
        self,
        stream: StreamedModel,
        stack: ChainStack,
        train: torch.Tensor,
        meter: FidelityMeter,
        config: LockConfig,
        work: Work,
        workers: Workers,
        progress: Progress,
    ):
        self.stream, self.stack, self.train, self.meter = stream, stack, train, meter
        self.config, self.work, self.workers, self.progress = config, work, workers, progress
        self.batch_rows = min(len(train), max(1, config.end_to_end_batch_tokens // train.shape[1]))
        self.steps = config.end_to_end_tokens // (self.batch_rows * train.shape[1])
        order = shuffled_order(len(train), self.steps * self.batch_rows, config.seed)
        self.batches = order.split(self.batch_rows)

    def run(self) -> EndToEndResult:
        """Train; leave the best held-out state in `stack`.

        Raises:
            DistillationError: the loss is no longer finite.
        """
        position = self._resume() or self._begin()
        started, before_seconds = time.perf_counter(), position.seconds
        evaluate_at = {round(self.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        self.progress.start("end to end", self.steps)
        self.progress.advance(position.step)
        saved = time.perf_counter()
        for step in range(position.step, self.steps):
            loss = self._step(self.batches[step], step)
            position.step = step + 1
            position.seconds = before_seconds + time.perf_counter() - started
            self.progress.advance(1, f"kl {loss:.5f}")
            if position.step in evaluate_at:
                self._keep_if_better(position, self.meter.measure(self.stack.chain))
            if position.step in evaluate_at or time.perf_counter() - saved > SAVE_EVERY_SECONDS:
                self._save(position)
                saved = time.perf_counter()
        if position.best_step:
            best = self.work.state("best")
            self.stack.load(best[0])
        else:
            self.stack.reset()
        self.progress.finish(f"kl {position.before_kl:.5f} -> {position.best_kl:.5f} on {self.meter.text}")
        tokens = self.steps * self.batch_rows * self.train.shape[1]
        return EndToEndResult(
            self.steps,
            position.best_step,
            tokens,
            position.learning_rate,
            position.seconds,
            position.before_kl,
            position.best_kl,
            self.meter.text,
        )

    def _begin(self) -> _Position:
        started = time.perf_counter()
        before = self.meter.measure(self.stack.chain)
        before_kl, highest_perplexity = before.kl_divergence, max(before.perplexity, before.original_perplexity)
        rate = self.config.end_to_end_learning_rate or self._find_rate(before_kl, highest_perplexity)
        self.stack.restart(rate, self.steps)
        return _Position(0, 0, before_kl, before_kl, highest_perplexity, rate, time.perf_counter() - started)

    def _find_rate(self, before_kl: float, highest_perplexity: float) -> float:
        """The rate whose trial reaches the lowest held-out KL; the lowest rate if none improves on phase 1."""
        steps = min(self.steps, max(SHORTEST_TRIAL, round(TRIAL_SHARE * self.steps)))
        self.progress.start("learning rate of phase 2", len(TRIAL_RATES))
        best, best_kl = TRIAL_RATES[0], before_kl
        for rate in TRIAL_RATES:
            self.stack.restart(rate, steps)
            try:
                for step in range(steps):
                    self._step(self.batches[step], step)
                reached = self.meter.measure(self.stack.chain)
            except DistillationError:
                break
            self.progress.advance(1, f"{rate:g}: held-out kl {reached.kl_divergence:.5f}")
            if reached.perplexity > highest_perplexity or not reached.kl_divergence < best_kl:
                break
            best, best_kl = rate, reached.kl_divergence
        self.progress.finish(f"{best:g}")
        return best

    def _resume(self) -> _Position | None:
        snapshot = self.work.state("snapshot")
        if snapshot is None:
            return None
        position = _Position(**read_json(snapshot[0] / "position.json", "--work"))
        self.stack.restart(position.learning_rate, self.steps)
        self.stack.load(snapshot[0], with_optimiser=True)
        return position

    def _keep_if_better(self, position: _Position, held_out: Fidelity) -> None:
        if held_out.perplexity <= position.highest_perplexity and held_out.kl_divergence < position.best_kl:
            position.best_kl, position.best_step = held_out.kl_divergence, position.step
            if self.workers.first:
                with self.work.new_state("best", position.step) as folder:
                    self.stack.save(folder)
            self.workers.wait()

    def _save(self, position: _Position) -> None:
        """A snapshot to go on from; what it does not need any more is deleted after it stands."""
        if self.workers.first:
            with self.work.new_state("snapshot", position.step) as folder:
                self.stack.save(folder, with_optimiser=True)
                write_json(folder / "position.json", asdict(position))
            self.work.drop_states("snapshot", position.step)
            self.work.drop_states("best", position.best_step)
        self.workers.wait()

    def _step(self, chosen: torch.Tensor, step: int) -> float:
        """One step on the rows `chosen`; returns the loss over all workers' rows."""
        mine = chosen[self.workers.rank :: self.workers.count]
        share = len(mine) / len(chosen)
        ids = self.train[mine].to(self.stream.device)
        if share:
            arguments, teacher, student = self._forward(ids)
            loss, gradient = self._loss(teacher, student, share)
        else:  # more workers than rows
            arguments, loss, gradient = [], torch.zeros(()), None
        return_free_memory()
        total = loss.detach().double().cpu().reshape(1)
        self.workers.sum_([total])
        if not torch.isfinite(total):
            raise DistillationError(f"phase 2 diverged (loss {total.item()}): lower --end-to-end-learning-rate")
        for index in reversed(range(len(self.stream))):
            with self.stack.trained(index) as (layer, chain, optimiser):
                if gradient is not None:
                    hidden = self.stack.take_input(index).requires_grad_(index > 0)
                    layer(hidden, **arguments[index]).backward(gradient)
                    gradient = hidden.grad
                for parameter in chain.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.workers.sum_([parameter.grad for parameter in chain.parameters()])
                torch.nn.utils.clip_grad_norm_(chain.parameters(), MAX_GRADIENT_NORM)
                optimiser.step(step)
        return total.item()

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
        """The layers' arguments and both last hidden states; the stack keeps the student's input of every layer."""
        hidden, arguments = self.stream.begin(ids)
        teacher = student = hidden
        for index in range(len(self.stream)):
            with self.stack.both(index) as (run_teacher, run_student):
                self.stack.keep_input(index, student)
                teacher = run_teacher(teacher, **arguments[index])
                student = run_student(student, **arguments[index])
        return arguments, teacher, student

    def _loss(self, teacher: torch.Tensor, student: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of the loss, and its gradient with respect to the student's last hidden state."""
        with torch.no_grad():
            target = self.stream.head(teacher)
        student = student.detach().requires_grad_(True)
        loss = mean_kl_divergence(self.stream.head(student), target) * share
        (gradient,) = torch.autograd.grad(loss, student)
        return loss, gradient
