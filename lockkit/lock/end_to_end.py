"""Phase 2: train all chains together on the KL divergence between the student's logits and the teacher's.

One step keeps the activations of one decoder layer in memory at a time:

1. Forward pass, layer by layer. The teacher's hidden states go through the layer with its MLP, the student's through
   the same layer with its chain. Only the student's input of each layer is kept.
2. Loss: KL(teacher || student) of the logits, averaged over tokens (arXiv 2605.10777, phase 2).
3. Backward pass, layer by layer. Run the layer again with gradients, update its chain, and pass the gradient of its
   input to the layer before. Workers share the rows of a batch and sum the gradients.

Only the chains are trained. If the chains, the optimisers and the teacher do not fit into memory together, each layer
is on disk while others are computed (`ChainStack`).

The learning rate is searched for first, unless it is given. Short trials start from the state after phase 1, with
rising rates. The search ends when a trial has a higher held-out KL than the one before. If none is better than phase 1,
phase 2 ends there. Trials are deterministic, so a lock that is interrupted during the search finds the same rate again.

Held-out KL and perplexity are measured several times, the last time at the end. The state with the lowest KL is kept,
among those whose perplexity is no higher than that after phase 1 or that of the original, whichever is higher. The
state after phase 1 is a candidate too, so phase 2 never makes the lock worse.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lockkit.errors import DistillationError
from lockkit.files import read_json, write_json
from lockkit.lock.config import LockConfig
from lockkit.lock.meter import FidelityMeter
from lockkit.lock.stack import ChainStack
from lockkit.lock.work import Work
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.measure.totals import kl_loss_and_gradient
from lockkit.models.layered import StreamedModel, return_free_memory
from lockkit.progress import Progress
from lockkit.training import shuffled_order
from lockkit.workers import Workers

EVALUATIONS = 4  # held-out measurements, evenly spaced over the steps
SAVE_EVERY_SECONDS = 120
MAX_GRADIENT_NORM = 1.0
TRIAL_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01)
TRIAL_SHARE = 1 / 4  # steps of a trial, as a share of all steps
SHORTEST_TRIAL = 8  # steps


@dataclass(frozen=True)
class EndToEndResult:
    """The result of phase 2.

    Attributes:
        steps: steps of training.
        best_step: the step after which the state was kept. 0 means the state after phase 1.
        tokens: tokens trained on.
        learning_rate: the peak; 0 if no trial was better than phase 1, and phase 2 ended there.
        seconds: wall time, over all runs of an interrupted lock.
        kl_divergence_before, kl_divergence_after: held-out KL, nats per token.
        text: the text of both.
    """

    steps: int
    best_step: int
    tokens: int
    learning_rate: float
    seconds: float
    kl_divergence_before: float
    kl_divergence_after: float
    text: MeasuredText

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return vars(self) | {"text": self.text.record()}


@dataclass
class _Position:
    """The progress of phase 2. It is saved with every snapshot."""

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
        stack: the chains after phase 1.
        train: token ids, `[rows, block]`.
        meter: measures the chains on held-out rows.
        config: the recipe.
        work: the work folder, for snapshots.
        workers: share each batch.
        progress: reports steps and losses.
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
        """Train, from the last snapshot if there is one. At the end, `stack` has the best held-out state.

        Raises:
            DistillationError: the loss is not finite.
        """
        position = self._resume() or self._begin()
        if position.learning_rate:
            self._train(position)
            self.progress.finish(f"KL {position.before_kl:.5f} -> {position.best_kl:.5f} on {self.meter.text}")
        best = self.work.state("best") if position.best_step else None
        if best:
            self.stack.load(best[0])
        else:
            self.stack.reset()
        return EndToEndResult(
            steps=position.step,
            best_step=position.best_step,
            tokens=position.step * self.batch_rows * self.train.shape[1],
            learning_rate=position.learning_rate,
            seconds=position.seconds,
            kl_divergence_before=position.before_kl,
            kl_divergence_after=position.best_kl,
            text=self.meter.text,
        )

    def _train(self, position: _Position) -> None:
        """Run the remaining steps; measure the chains and save snapshots on the way."""
        started, before_seconds = time.perf_counter(), position.seconds
        evaluate_at = {round(self.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        self.progress.start("phase 2, all layers", self.steps)
        self.progress.advance(position.step)
        saved = time.perf_counter()
        for step in range(position.step, self.steps):
            loss = self._step(self.batches[step], step)
            position.step = step + 1
            position.seconds = before_seconds + time.perf_counter() - started
            self.progress.advance(1, f"KL {loss:.5f}")
            if position.step in evaluate_at:
                self._keep_if_better(position, self.meter.measure(self.stack.chain))
            if position.step in evaluate_at or time.perf_counter() - saved > SAVE_EVERY_SECONDS:
                self._save(position)
                saved = time.perf_counter()

    def _begin(self) -> _Position:
        """The position before the first step, with the learning rate chosen."""
        started = time.perf_counter()
        before = self.meter.measure(self.stack.chain)
        before_kl, highest_perplexity = before.kl_divergence, max(before.perplexity, before.original_perplexity)
        if not math.isfinite(highest_perplexity):
            raise DistillationError(
                f"the perplexity after phase 1 is {highest_perplexity}: raise --tokens, or lower --learning-rate"
            )
        rate = self.config.end_to_end_learning_rate or self._find_rate(before_kl, highest_perplexity)
        if rate:
            self.stack.restart(rate, self.steps)
        return _Position(0, 0, before_kl, before_kl, highest_perplexity, rate, time.perf_counter() - started)

    def _find_rate(self, before_kl: float, highest_perplexity: float) -> float:
        """The rate whose trial reaches the lowest held-out KL; 0 if no trial is better than phase 1."""
        steps = min(self.steps, max(SHORTEST_TRIAL, round(TRIAL_SHARE * self.steps)))
        self.progress.start("phase 2, learning rate", len(TRIAL_RATES))
        best, best_kl = 0.0, before_kl
        for rate in TRIAL_RATES:
            self.stack.restart(rate, steps)
            try:
                for step in range(steps):
                    self._step(self.batches[step], step)
                reached = self.meter.measure(self.stack.chain)
            except DistillationError:
                break
            self.progress.advance(1, f"{rate:g}: held-out KL {reached.kl_divergence:.5f}")
            if reached.perplexity > highest_perplexity or not reached.kl_divergence < best_kl:
                break
            best, best_kl = rate, reached.kl_divergence
        self.progress.finish(f"{best:g}" if best else "no trial was better than phase 1, so phase 2 ends here")
        return best

    def _resume(self) -> _Position | None:
        """Load the newest snapshot into the stack. None if there is none."""
        snapshot = self.work.state("snapshot")
        if snapshot is None:
            return None
        position = _Position(**read_json(snapshot[0] / "position.json", "--work"))
        self.stack.restart(position.learning_rate, self.steps)
        self.stack.load(snapshot[0], with_optimiser=True)
        return position

    def _keep_if_better(self, position: _Position, held_out: Fidelity) -> None:
        """Save the current state as the best one if its held-out figures are better."""
        if held_out.perplexity <= position.highest_perplexity and held_out.kl_divergence < position.best_kl:
            position.best_kl, position.best_step = held_out.kl_divergence, position.step
            if self.workers.first:
                with self.work.new_state("best", position.step) as folder:
                    self.stack.save(folder)
            self.workers.wait()

    def _save(self, position: _Position) -> None:
        """Save a snapshot to resume from. Then delete the states that it replaces."""
        if self.workers.first:
            with self.work.new_state("snapshot", position.step) as folder:
                self.stack.save(folder, with_optimiser=True)
                write_json(folder / "position.json", asdict(position))
            self.work.drop_states("snapshot", position.step)
            self.work.drop_states("best", position.best_step)
        self.workers.wait()

    def _step(self, chosen: torch.Tensor, step: int) -> float:
        """One training step.

        Args:
            chosen: indices of the batch's rows, int64 `[batch]`. Each worker takes its share.
            step: counts from 0.

        Returns:
            The loss over the whole batch, in nats per token.
        """
        mine = chosen[self.workers.rank :: self.workers.count]
        share = len(mine) / len(chosen)
        ids = self.train[mine].to(self.stream.device)
        if share:
            arguments, teacher, student = self._forward(ids)
            loss, gradient = kl_loss_and_gradient(student, teacher, self.stream.head)
            loss, gradient = loss * share, gradient * share
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
                self.workers.sum_(_gradients(chain))
                torch.nn.utils.clip_grad_norm_(chain.parameters(), MAX_GRADIENT_NORM)
                optimiser.step(step)
        return total.item()

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor) -> tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor]:
        """Run both models on token ids, `[rows, block]`. The stack keeps the student's input of every layer.

        Returns:
            The keyword arguments of every layer, and the last hidden states of teacher and student,
            `[rows, block, hidden]` each.
        """
        hidden, arguments = self.stream.begin(ids)
        teacher = student = hidden
        for index in range(len(self.stream)):
            with self.stack.both(index) as (run_teacher, run_student):
                self.stack.keep_input(index, student)
                teacher = run_teacher(teacher, **arguments[index])
                student = run_student(student, **arguments[index])
        return arguments, teacher, student


def _gradients(chain: nn.Module) -> list[torch.Tensor]:
    """The gradients of all parameters, set to zero where a worker without rows has none."""
    gradients = []
    for parameter in chain.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients
