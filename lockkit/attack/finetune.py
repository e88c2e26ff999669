"""The fine-tuning loop of all gradient attacks.

1. An attack prepares a `Training`: a model, the parameters to train, and an optimiser or a step of its own
   (a zeroth-order method, for example).
2. `finetune` runs it for a number of steps: batches in an order fixed by the seed, warm-up and
   schedule, clipped gradients. It measures the held-out loss at even intervals.
3. Steps 2 to 4 are run under the counters of cost.py. The others are timed; a step costs the median of their times.
   So each point of the curve has its cost: steps, tokens, operations, seconds. If there are several kinds of steps (an
   attack that trains one part of the model after the other), the first three of each kind are counted.
4. A run ends early if its held-out loss is low enough, or if it can no longer be the cheapest (`stop_loss` and
   `most_steps`). Its learning rate follows the schedule of all steps all the same. In the second case nothing more is
   measured on it: it may lack seconds and a loss on general text.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from lockkit.attack.cost import Cost, ProcessMemory, StepCost, measure_step
from lockkit.attack.losses import held_out_loss, logits_of, task_loss
from lockkit.attack.savers import saver
from lockkit.attack.tasks import Rows, Task
from lockkit.devices import synchronise
from lockkit.training import learning_rate_share, shuffled_batches

COUNTED_STEPS = 3  # after the first step, which allocates the optimiser's state
TIMED_STEPS = 3  # at least, after those
MIN_STEPS = 8
BROKEN = "the held-out loss is not finite before the first step"


class FinetuneConfig(BaseModel):
    """Settings of a fine-tuning run. An attack may add its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    steps: int = Field(32, ge=MIN_STEPS, description="Optimiser steps.")
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
    stop_loss: float | None = Field(None, description="End when the held-out loss is at most this, in nats per label.")
    most_steps: int | None = Field(
        None, ge=1, description="End after this many steps. The schedule of the learning rate is for all `steps`."
    )
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

    `flops` is NaN if no step was counted, and `seconds` if none was timed.
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
    trained_parameters: int | None = None
    step_seconds: tuple[float, float, float] | None = None  # lowest quarter, median, highest quarter
    general_loss: float | None = None  # on general text after the run, in nats per token

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
    general: Rows | None = None,
) -> FinetuneResult:
    """Fine-tune on a task, see the top of this file. `training.model` is changed in place.

    Args:
        advance: called with a note after each point of the curve.
        general: text on which the model's loss is measured after the run. Its cost is not counted.

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
        while run.goes_on():
            run.advance_steps()
    result = run.result(memory)
    if general is not None and not result.diverged and not is_beaten(config, *run.measured[-1]):
        result.general_loss = held_out_loss(training.model, general, run.device)
    return result


def ends_early(config: FinetuneConfig, steps: int, loss: float) -> bool:
    """Whether a run ends after this many steps, at this held-out loss."""
    return _reached(config, loss) or is_beaten(config, steps, loss)


def is_beaten(config: FinetuneConfig, steps: int, loss: float) -> bool:
    """Whether a run with this held-out loss after this many steps can no longer be the cheapest."""
    return config.most_steps is not None and steps >= config.most_steps and not _reached(config, loss)


def _reached(config: FinetuneConfig, loss: float) -> bool:
    return config.stop_loss is not None and loss <= config.stop_loss


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """The lowest quarter, the median and the highest quarter of the times of steps; 0 without any."""
    if len(seconds) < 2:
        return (seconds[0],) * 3 if seconds else (0.0, 0.0, 0.0)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def trained_parameters(parameters: Iterable[torch.Tensor]) -> int:
    """The number of trained parameters, each tensor once."""
    return sum({id(p): p.numel() for p in parameters if p.requires_grad}.values())


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
        self._seconds: list[float] = []  # of each timed step
        self._ended = self._beaten = False  # after the end, further steps are only counted and timed
        self._trained = trained_parameters(training.parameters)

    def goes_on(self) -> bool:
        """Whether there is another step to take."""
        finite = all(math.isfinite(loss) for loss in self.losses[-1:])
        figures_known = bool(self._counted) and (self._beaten or len(self._seconds) >= TIMED_STEPS)
        return self.steps_done < self.config.steps and finite and not (self._ended and figures_known)

    def evaluate(self) -> None:
        """Add a point to the curve."""
        with _averaged_weights(self.training.optimiser):
            loss = held_out_loss(self.training.model, self.task.held_out, self.device)
        self.measured.append((self.steps_done, loss))
        self._ended = ends_early(self.config, self.steps_done, loss)
        self._beaten = is_beaten(self.config, self.steps_done, loss)
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
                self._seconds.append(time.perf_counter() - started)
        if not self._ended and self._evaluate_after.intersection(range(before + 1, self.steps_done + 1)):
            self.evaluate()

    def _one_step(self) -> None:
        ids, labels = (part.to(self.device) for part in next(self._source))
        share = self.config.learning_rate_share(self.steps_done)
        self.losses.append(_step(self.training, self.config, ids, labels, share, self._rates))
        self.steps_done += 1

    def result(self, memory: ProcessMemory) -> FinetuneResult:
        """The figures of the run so far; `memory` measured its peak."""
        tokens_per_step = self.config.batch_rows * self.task.train.ids.shape[1]
        times = quartiles(self._seconds)
        charges = Charges(self.training, self._counted, tokens_per_step, times[1])
        diverged = not all(math.isfinite(loss) for loss in [*self.losses, *(loss for _, loss in self.measured)])
        curve = [charges.point(step, loss) for step, loss in self.measured if math.isfinite(loss)]
        cost, notes = charges.total(self.steps_done, memory), dict(self.training.notes)
        return FinetuneResult(curve, cost, diverged, notes, self._trained, times)


@dataclass(frozen=True)
class Charges:
    """The cost of a run, from the figures of one step of each kind."""

    training: Training
    counted: dict[int, StepCost]  # by kind of step
    tokens_per_step: int
    seconds_per_step: float  # 0 if no step was timed

    def _flops(self, steps: int) -> float:
        if not self.counted:
            return math.nan
        most = max(cost.flops for cost in self.counted.values())  # for kinds with too few steps to count
        kinds = (self.training.kind(step) for step in range(steps))
        return float(sum(self.counted[kind].flops if kind in self.counted else most for kind in kinds))

    def _seconds(self, steps: int) -> float:
        return steps * self.seconds_per_step if self.seconds_per_step or not steps else math.nan

    def point(self, step: int, loss: float) -> Point:
        """The point of the curve after `step` steps. Its cost includes that of preparing the training."""
        before = self.training.before
        return Point(
            step,
            before.tokens + step * self.tokens_per_step,
            before.flops + self._flops(step),
            before.seconds + self._seconds(step),
            loss,
        )

    def total(self, steps: int, memory: ProcessMemory) -> Cost:
        """The cost of the whole run of `steps` steps."""
        costs = list(self.counted.values())
        return self.training.before + Cost(
            steps=steps,
            tokens=steps * self.tokens_per_step,
            flops=self._flops(steps),
            seconds=self._seconds(steps),
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
