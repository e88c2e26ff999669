"""The fine-tuning loop of all gradient attacks.

1. An attack prepares a `Training`: a model, the parameters to train, and an optimiser or a step of its own
   (a zeroth-order method, for example).
2. `finetune` runs it for a number of steps: batches in an order fixed by the seed, warm-up and
   schedule, clipped gradients. It measures the held-out loss at even intervals.
3. Steps 2 to 4 are run under the counters of cost.py. The others are timed. So each point of the curve has
   its cost: steps, tokens, operations, seconds. If there are several kinds of steps (an attack that trains one part
   of the model after the other), the first three of each kind are counted.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

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
COUNTED_STEPS = 3  # after the first step, which allocates the optimiser's state
BROKEN = "the held-out loss is not finite before the first step"


class FinetuneConfig(BaseModel):
    """Settings of a fine-tuning run. An attack may add its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    steps: int = Field(32, ge=8, description="Optimiser steps.")
    batch_rows: int = Field(8, ge=1, description="Rows per step.")
    warm_up: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0.")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="Course of the learning rate after warm-up.")
    max_gradient_norm: float = Field(
        1.0,
        gt=0,
        description="Gradients are scaled down before a step if the norm of all of them together is above this.",
    )
    saver: str = Field("none", description="Memory saver, see savers.py.")
    evaluations: int = Field(8, ge=1, description="Points of the held-out curve after the first.")
    seed: int = Field(0, ge=0, description="Seed of the order of rows, and of all random choices of the attack.")

    def learning_rate_share(self, step: int) -> float:
        """Share of the peak learning rate at `step`, counted from 0."""
        return learning_rate_share(step, self.steps, self.warm_up, self.schedule)


@dataclass
class Training:
    """What an attack trains, and how.

    Attributes:
        model: called with `input_ids` `[batch, seq]`; returns logits.
        parameters: the trained parameters.
        optimiser: None for an attack with a step of its own.
        step: replaces forward pass, backward pass and update; from ids and labels, `[batch, seq]`, and the share of the
            peak learning rate, to the loss.
        loss: the training loss from ids and labels, if it is not the task's loss on the model's logits.
        state: tensors that are alive between steps besides the model's and the optimiser's.
        kind: the kind of a step, from its number. Steps of one kind have the same cost.
        before: cost of preparing the training; it is added to that of the steps.
        notes: further figures for the row.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer | None
    step: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    state: Callable[[], Iterable[torch.Tensor]] = tuple
    kind: Callable[[int], int] = lambda _step: 0
    before: Cost = field(default_factory=Cost)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A point of the curve: held-out loss in nats per label, and the cost so far.

    `flops` is NaN if no step was counted.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float

    def record(self) -> dict:
        """The fields as JSON values."""
        return dict(vars(self))


@dataclass
class FinetuneResult:
    """A finished run. `diverged` is whether any loss was not finite; the curve has only finite losses."""

    curve: list[Point]
    cost: Cost
    diverged: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> float:
        """Held-out loss before the first step, in nats per label."""
        return self.curve[0].loss

    @property
    def best(self) -> float:
        """Lowest held-out loss, in nats per label."""
        return min(point.loss for point in self.curve)

    def mean_over_log_budget(self) -> float:
        """The mean of the held-out loss over a logarithmic axis of steps, in nats per label."""
        points = [(math.log(point.step), point.loss) for point in self.curve if point.step > 0]
        if len(points) < 2:
            return points[0][1] if points else self.start
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        return area / (points[-1][0] - points[0][0])


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits, `[batch, seq, vocab]`, for `ids`, `[batch, seq]`. The model may return them in an output object."""
    out = model(input_ids=ids, use_cache=False)
    return out if isinstance(out, torch.Tensor) else out.logits


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss over the labels that count, in nats.

    Args:
        logits: `[batch, seq, vocab]`.
        labels: `[batch, seq]`; `IGNORED` for tokens that do not count.
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
    """The numbers of steps after which the held-out loss is measured, besides 0."""
    return {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}


def finetune(
    training: Training,
    task: Task,
    config: FinetuneConfig,
    advance: Callable[[str], None] = lambda note: None,
) -> FinetuneResult:
    """Fine-tune on a task, see the top of this file. `training.model` is changed in place.

    Args:
        advance: called with a note after each point of the curve.

    Raises:
        FloatingPointError: the held-out loss is not finite before the first step.
    """
    run = _Run(training, task, config, advance)
    run.evaluate()
    if not math.isfinite(run.measured[0][1]):
        raise FloatingPointError(BROKEN)
    training.model.train()
    with ProcessMemory(run.device) as memory, saver(config.saver, training.model), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        while run.steps_done < config.steps and all(math.isfinite(loss) for loss in run.losses[-1:]):
            run.advance_steps()
    return run.result(memory)


class _Run:
    """The state of one fine-tuning run: steps taken, losses, and the figures of steps."""

    def __init__(self, training: Training, task: Task, config: FinetuneConfig, advance: Callable[[str], None]):
        self.training, self.task, self.config, self.advance = training, task, config, advance
        self.device = next(training.model.parameters()).device
        self.steps_done = 0
        self.losses: list[float] = []
        self.measured: list[tuple[int, float]] = []  # steps, held-out loss
        self._rates = [group["lr"] for group in training.optimiser.param_groups] if training.optimiser else []
        self._source = batches(task.train, config.batch_rows, config.steps, config.seed)
        self._evaluate_after = evaluation_steps(config)
        self._counted: dict[int, StepCost] = {}
        self._timed_steps, self._timed_seconds = 0, 0.0

    def evaluate(self) -> None:
        """Add a point to the curve."""
        with _averaged_weights(self.training.optimiser):
            loss = held_out_loss(self.training.model, self.task.held_out, self.device)
        self.measured.append((self.steps_done, loss))
        self.advance(f"loss {loss:.3f}")

    def advance_steps(self) -> None:
        """Take one timed step, or the counted steps of a new kind; evaluate if a point of the curve is due."""
        kind, before = self.training.kind(self.steps_done), self.steps_done
        if kind not in self._counted and 1 <= before <= self.config.steps - COUNTED_STEPS:
            alive = tensors_of(self.training)
            self._counted[kind] = measure_step(self._one_step, self.training.parameters, self.device, alive)
        else:
            started = time.perf_counter()
            self._one_step()
            synchronise(self.device)
            if self.steps_done > 1:  # the first step is the warm-up
                self._timed_steps += 1
                self._timed_seconds += time.perf_counter() - started
        if self._evaluate_after.intersection(range(before + 1, self.steps_done + 1)):
            self.evaluate()

    def _one_step(self) -> None:
        ids, labels = (part.to(self.device) for part in next(self._source))
        share = self.config.learning_rate_share(self.steps_done)
        self.losses.append(_step(self.training, self.config, ids, labels, share, self._rates))
        self.steps_done += 1

    def result(self, memory: ProcessMemory) -> FinetuneResult:
        """The figures of the run so far; `memory` measured its peak."""
        tokens_per_step = self.config.batch_rows * self.task.train.ids.shape[1]
        seconds_per_step = self._timed_seconds / max(1, self._timed_steps)
        charges = Charges(self.training, self._counted, tokens_per_step, seconds_per_step)
        diverged = not all(math.isfinite(loss) for loss in [*self.losses, *(loss for _, loss in self.measured)])
        curve = [charges.point(step, loss) for step, loss in self.measured if math.isfinite(loss)]
        return FinetuneResult(curve, charges.total(self.steps_done, memory), diverged, dict(self.training.notes))


@dataclass(frozen=True)
class Charges:
    """The cost of a run, from the figures of one step of each kind."""

    training: Training
    counted: dict[int, StepCost]  # by kind of step
    tokens_per_step: int
    seconds_per_step: float

    def _flops(self, steps: int) -> float:
        if not self.counted:
            return math.nan
        most = max(cost.flops for cost in self.counted.values())  # for kinds with too few steps to count
        kinds = (self.training.kind(step) for step in range(steps))
        return float(sum(self.counted[kind].flops if kind in self.counted else most for kind in kinds))

    def point(self, step: int, loss: float) -> Point:
        """The point of the curve after `step` steps. Its cost includes that of preparing the training."""
        before = self.training.before
        return Point(
            step,
            before.tokens + step * self.tokens_per_step,
            before.flops + self._flops(step),
            before.seconds + step * self.seconds_per_step,
            loss,
        )

    def total(self, steps: int, memory: ProcessMemory) -> Cost:
        """The cost of the whole run of `steps` steps."""
        costs = list(self.counted.values())
        return self.training.before + Cost(
            steps=steps,
            tokens=steps * self.tokens_per_step,
            flops=self._flops(steps),
            seconds=steps * self.seconds_per_step,
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
    """Take one step; return the training loss before it.

    Args:
        share: share of the peak learning rate.
        rates: peak learning rate of each parameter group of the optimiser.
    """
    if training.step is not None:
        return float(training.step(ids, labels, share))
    optimiser = training.optimiser
    assert optimiser is not None, "an attack without a step of its own has an optimiser"
    for group, rate in zip(optimiser.param_groups, rates, strict=False):
        group["lr"] = rate * share
    if training.loss is not None:
        loss = training.loss(ids, labels)
    else:
        loss = task_loss(logits_of(training.model, ids), labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.parameters, config.max_gradient_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.item()


def tensors_of(training: Training) -> list[torch.Tensor]:
    """The tensors that are alive between steps: the model's, the optimiser's state, and `training.state`."""
    found = [*training.model.parameters(), *training.model.buffers(), *training.state()]
    states = getattr(training.optimiser, "state", {}) or {}
    for state in states.values():
        if isinstance(state, dict):
            found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return found


@contextlib.contextmanager
def _averaged_weights(optimiser: torch.optim.Optimizer | None) -> Iterator[None]:
    """Inside the block, a schedule-free optimiser gives the model the average of its iterates."""
    to_average, back = getattr(optimiser, "eval", None), getattr(optimiser, "train", None)
    if to_average is None or back is None:
        yield
        return
    to_average()
    try:
        yield
    finally:
        back()
