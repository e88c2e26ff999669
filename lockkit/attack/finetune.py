"""The fine-tuning loop of all gradient attacks.

1. An attack prepares a `Training`: a model, what of it is trained, an optimiser, a memory saver, or
   a step of its own (zeroth order, say).
2. `finetune` runs it for a number of steps: batches in an order fixed by the seed, warm-up and
   schedule, gradients clipped; held-out loss at even intervals.
3. Steps 2 to 4 are run under the counters of cost.py; the others are timed. Each point of the curve has
   its cost: steps, tokens, operations, seconds. Where steps differ (another part of
   the model is trained), the first three of each kind are counted.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from lockkit.attack.cost import Cost, ProcessMemory, StepCost, measure_step
from lockkit.attack.savers import saver
from lockkit.attack.tasks import IGNORED, Rows, Task
from lockkit.devices import synchronise
from lockkit.training import learning_rate_share, shuffled_batches

EVALUATION_ROWS = 16
COUNTED_STEPS = 3  # after the first, which makes the optimiser's state
BROKEN = "the held-out loss is not finite before the first step"


class FinetuneConfig(BaseModel):
    """Settings of a fine-tuning run; an attack adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    steps: int = Field(32, ge=8, description="Optimiser steps.")
    batch_rows: int = Field(8, ge=1, description="Rows in a step.")
    warm_up: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0.")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="Course of the learning rate after warm-up.")
    max_gradient_norm: float = Field(
        1.0,
        gt=0,
        description="Norm of all gradients together above which they are scaled down to it, before each step.",
    )
    saver: str = Field("none", description="Memory saver, see savers.py.")
    evaluations: int = Field(8, ge=1, description="Points of the held-out curve after the first.")
    seed: int = Field(0, ge=0, description="Seed of the order of rows and of anything random in the attack.")

    def learning_rate_share(self, step: int) -> float:
        """Share of the peak learning rate at `step`, counted from 0."""
        return learning_rate_share(step, self.steps, self.warm_up, self.schedule)


@dataclass
class Training:
    """What an attack trains, and how."""

    model: nn.Module  # called with input_ids, gives logits
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer | None
    # A whole step in place of forward, backward and update: (ids, labels, share of the learning rate) -> loss.
    step: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    # The training loss, if it is not the task's on the model's logits.
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    # Tensors alive between steps besides the model's and the optimiser's.
    state: Callable[[], Iterable[torch.Tensor]] = tuple
    # Which kind of step the step of this number is; steps of a kind cost the same.
    kind: Callable[[int], int] = lambda _step: 0
    before: Cost = field(default_factory=Cost)  # spent on preparing, and charged
    notes: dict = field(default_factory=dict)  # further figures for the row


@dataclass(frozen=True)
class Point:
    """Held-out loss in nats per label, and the cost up to there; `flops` is NaN if no step was counted."""

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float

    def record(self) -> dict:
        """As JSON holds it."""
        return dict(vars(self))


@dataclass
class FinetuneResult:
    """A finished run; `diverged` says that a loss was not finite. The curve has finite losses only."""

    curve: list[Point]
    cost: Cost
    diverged: bool = False
    notes: dict = field(default_factory=dict)

    @property
    def start(self) -> float:
        """Held-out loss before the first step, in nats per label."""
        return self.curve[0].loss

    @property
    def best(self) -> float:
        """Lowest held-out loss, in nats per label."""
        return min(point.loss for point in self.curve)

    def mean_over_log_budget(self) -> float:
        """Area under the loss on a logarithmic axis of steps, over that axis' length."""
        points = [(math.log(point.step), point.loss) for point in self.curve if point.step > 0]
        if len(points) < 2:
            return points[0][1] if points else self.start
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        return area / (points[-1][0] - points[0][0])


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, `[batch, seq, vocab]`, for `ids`, `[batch, seq]`; the model may return them in an output object."""
    out = model(input_ids=ids, use_cache=False)
    return out if isinstance(out, torch.Tensor) else out.logits


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss over the labels that count, in nats.

    Args:
        logits: `[batch, seq, vocab]`.
        labels: `[batch, seq]`; `IGNORED` where a token does not count.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Rows, device: torch.device) -> float:
    """Mean loss over all labels of `rows`, in nats per label."""
    was_training = model.training
    model.eval()
    total = count = 0.0
    for ids, labels in zip(rows.ids.split(EVALUATION_ROWS), rows.labels.split(EVALUATION_ROWS), strict=True):
        labels = labels.to(device)
        counted = int((labels[:, 1:] != IGNORED).sum())
        if counted:
            total += task_loss(logits_of(model, ids.to(device)), labels).item() * counted
            count += counted
    model.train(was_training)
    return total / count


def batches(rows: Rows, batch_rows: int, steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `steps` batches of ids and labels, `[batch_rows, block]`: whole passes in random orders."""
    for chosen in itertools.islice(shuffled_batches(len(rows), batch_rows, seed), steps):
        yield rows.ids[chosen], rows.labels[chosen]


def evaluation_steps(config: FinetuneConfig) -> set[int]:
    """After how many steps the held-out loss is measured, besides before the first."""
    return {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}


def finetune(
    training: Training,
    task: Task,
    config: FinetuneConfig,
    advance: Callable[[str], None] = lambda note: None,
) -> FinetuneResult:
    """Fine-tune on a task; see the top of this file. `training.model` is changed in place.

    Args:
        advance: called with a note after each point of the curve.

    Raises:
        FloatingPointError: the model was broken before the first step.
    """
    model, device = training.model, next(training.model.parameters()).device
    rates = [group["lr"] for group in training.optimiser.param_groups] if training.optimiser else []
    source = batches(task.train, config.batch_rows, config.steps, config.seed)
    tokens_a_step = config.batch_rows * task.train.ids.shape[1]
    steps_done = 0
    losses: list[float] = []

    def one_step() -> None:
        nonlocal steps_done
        ids, labels = (part.to(device) for part in next(source))
        share = config.learning_rate_share(steps_done)
        losses.append(_step(training, config, ids, labels, share, rates))
        steps_done += 1

    evaluate_after = evaluation_steps(config)
    measured: list[tuple[int, float]] = []  # steps, loss

    def evaluate() -> None:
        with _averaged_weights(training.optimiser):
            loss = held_out_loss(model, task.held_out, device)
        measured.append((steps_done, loss))
        advance(f"loss {loss:.3f}")

    counted: dict[int, StepCost] = {}
    timed_steps, timed_seconds = 0, 0.0
    evaluate()
    if not math.isfinite(measured[0][1]):
        raise FloatingPointError(BROKEN)
    model.train()
    with ProcessMemory(device) as memory, saver(config.saver, model), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        while steps_done < config.steps and all(math.isfinite(loss) for loss in losses[-1:]):
            kind, before = training.kind(steps_done), steps_done
            if kind not in counted and 1 <= steps_done <= config.steps - COUNTED_STEPS:
                counted[kind] = measure_step(one_step, training.parameters, device, tensors_of(training))
            else:
                started = time.perf_counter()
                one_step()
                synchronise(device)
                if steps_done > 1:  # the first step is the warm-up
                    timed_steps, timed_seconds = timed_steps + 1, timed_seconds + time.perf_counter() - started
            if evaluate_after.intersection(range(before + 1, steps_done + 1)):
                evaluate()
    diverged = not all(math.isfinite(loss) for loss in losses) or not all(math.isfinite(loss) for _, loss in measured)
    seconds_a_step = timed_seconds / max(1, timed_steps)
    charges = Charges(training, counted, tokens_a_step, seconds_a_step)
    curve = [charges.point(step, loss) for step, loss in measured if math.isfinite(loss)]
    return FinetuneResult(curve, charges.total(steps_done, memory), diverged, dict(training.notes))


@dataclass(frozen=True)
class Charges:
    """What a run's steps cost, from the figures of one step of each kind."""

    training: Training
    counted: dict[int, StepCost]
    tokens_a_step: int
    seconds_a_step: float

    def _flops(self, steps: int) -> float:
        if not self.counted:
            return math.nan
        most = max(cost.flops for cost in self.counted.values())  # for kinds that had too few steps to count
        kinds = (self.training.kind(step) for step in range(steps))
        return float(sum(self.counted[kind].flops if kind in self.counted else most for kind in kinds))

    def point(self, step: int, loss: float) -> Point:
        """A point of the curve after `step` steps, with what was spent before the first."""
        before = self.training.before
        return Point(
            step,
            before.tokens + step * self.tokens_a_step,
            before.flops + self._flops(step),
            before.seconds + step * self.seconds_a_step,
            loss,
        )

    def total(self, steps: int, memory: ProcessMemory) -> Cost:
        """The whole run's cost."""
        costs = list(self.counted.values())
        return self.training.before + Cost(
            steps=steps,
            tokens=steps * self.tokens_a_step,
            flops=self._flops(steps),
            seconds=steps * self.seconds_a_step,
            peak_tensor_bytes=max((cost.peak_tensor_bytes for cost in costs), default=0),
            saved_bytes=max((cost.saved_bytes for cost in costs), default=0),
            peak_memory_bytes=memory.allocated,
            peak_reserved_bytes=memory.reserved,
        )


def _step(
    training: Training,
    config: FinetuneConfig,
    ids: torch.Tensor,
    labels: torch.Tensor,
    share: float,
    rates: list[float],
) -> float:
    """Take one step; return the training loss before it."""
    if training.step is not None:
        return float(training.step(ids, labels, share))
    for group, rate in zip(training.optimiser.param_groups, rates, strict=False):
        group["lr"] = rate * share
    if training.loss is not None:
        loss = training.loss(ids, labels)
    else:
        loss = task_loss(logits_of(training.model, ids), labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.parameters, config.max_gradient_norm)
    training.optimiser.step()
    training.optimiser.zero_grad(set_to_none=True)
    return loss.item()


def tensors_of(training: Training) -> list[torch.Tensor]:
    """Tensors alive between steps: the whole model's, and the optimiser's state."""
    found = [*training.model.parameters(), *training.model.buffers(), *training.state()]
    states = getattr(training.optimiser, "state", {}) or {}
    for state in states.values():
        if isinstance(state, dict):
            found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return found


@contextlib.contextmanager
def _averaged_weights(optimiser: torch.optim.Optimizer | None) -> Iterator[None]:
    """Schedule-free optimisers are evaluated at an average of their iterates."""
    switch = getattr(optimiser, "eval", None)
    if switch is None:
        yield
        return
    switch()
    try:
        yield
    finally:
        optimiser.train()
