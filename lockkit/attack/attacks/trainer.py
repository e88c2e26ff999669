"""The baseline in a second, independent training loop: Hugging Face's `Trainer`.

Rows and their order, optimiser, schedule and clipping are the same; only the loop differs. If a lock resisted one loop
and not the other, lockkit's own loop would have a mistake.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lockkit.attack.base import GradientAttack
from lockkit.attack.cost import LiveTensors, ProcessMemory, SavedTensors, StepCost, flop_counter
from lockkit.attack.finetune import (
    BROKEN,
    Charges,
    FinetuneConfig,
    FinetuneResult,
    Training,
    batches,
    evaluation_steps,
    held_out_loss,
    tensors_of,
)
from lockkit.attack.optimisers import make_optimiser
from lockkit.attack.savers import saver
from lockkit.attack.tasks import Task
from lockkit.devices import synchronise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from lockkit.attack.bench import Bench

FLOPS_STEP, LIVE_STEP, SAVED_STEP = 1, 2, 3  # steps with one counter each, as in cost.measure_step
Counter = FlopCounterMode | LiveTensors | SavedTensors


class TrainerFinetune(GradientAttack):
    """The baseline's steps, driven by `transformers.Trainer`."""

    name = "trainer"
    description = "All weights with AdamW through Hugging Face's Trainer: the baseline in an independent training loop."
    reference = "transformers, Trainer"
    family = "baseline"

    def prepare(self, model: PreTrainedModel, bench: Bench) -> Training:
        """Train all weights of `model` with AdamW."""
        named, config = list(model.named_parameters()), self.config
        return Training(model, [p for _, p in named], make_optimiser("adamw", named, config.learning_rate))

    def run(self, model: PreTrainedModel, bench: Bench, task: Task) -> FinetuneResult:
        """Fine-tune with the Trainer. Costs are counted as in `finetune`.

        Raises:
            FloatingPointError: the held-out loss is not finite before the first step.
        """
        import transformers

        config, training = self.config, self.prepare(model, bench)
        assert training.optimiser is not None, "`prepare` sets it"
        rows = [
            {"input_ids": ids, "labels": labels}
            for batch in batches(task.train, config.batch_rows, config.steps, config.seed)
            for ids, labels in zip(*batch, strict=True)
        ]
        watch = _watch(training, task, config, bench.device)
        if watch.diverged:
            raise FloatingPointError(BROKEN)
        with tempfile.TemporaryDirectory() as folder, saver(config.saver, model), ProcessMemory(bench.device) as memory:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=config.batch_rows,
                max_steps=config.steps,
                max_grad_norm=config.max_gradient_norm,
                train_sampling_strategy="sequential",
                use_cpu=bench.device.type == "cpu",
                seed=config.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(training.optimiser, config.learning_rate_share)
            trainer = transformers.Trainer(
                model,
                arguments,
                train_dataset=rows,
                optimizers=(training.optimiser, schedule),
                callbacks=[watch],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        charges = watch.charges(config.batch_rows * task.train.ids.shape[1])
        curve = [charges.point(step, loss) for step, loss in watch.measured]
        return FinetuneResult(curve, charges.total(watch.steps, memory), watch.diverged)


def _watch(training: Training, task: Task, config: FinetuneConfig, device: torch.device) -> TrainerCallback:
    """A callback that counts, times and evaluates as `finetune` does."""
    import transformers

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.steps, self.timed, self.seconds, self.diverged = 0, 0, 0.0, False
            self.measured: list[tuple[int, float]] = []  # steps, held-out loss
            self.figures: dict[str, Any] = {}  # of one step: the fields of `StepCost`
            self.counter: Counter | None = None
            self._measure()

        def _measure(self) -> None:
            loss = held_out_loss(training.model, task.held_out, device)
            self.diverged = not math.isfinite(loss)
            if not self.diverged:
                self.measured.append((self.steps, loss))

        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            """Start the counter of this step, if it has one, and the clock."""
            self.counter = self._counter()
            if self.counter is not None:
                self.counter.__enter__()
            self.started = time.perf_counter()

        def _counter(self) -> Counter | None:
            if self.steps == FLOPS_STEP:
                return flop_counter()
            if self.steps == LIVE_STEP:
                return LiveTensors(device, tensors_of(training))
            return SavedTensors(training.parameters) if self.steps == SAVED_STEP else None

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            """Read the counter or the clock; evaluate if a point of the curve is due."""
            synchronise(device)
            seconds = time.perf_counter() - self.started
            counter = self.counter
            if counter is not None:
                counter.__exit__(None, None, None)
            if isinstance(counter, FlopCounterMode):
                self.figures["flops"] = float(counter.get_total_flops())
            elif isinstance(counter, LiveTensors):
                self.figures["peak_tensor_bytes"] = counter.peak
            elif isinstance(counter, SavedTensors):
                self.figures["saved_bytes"] = counter.bytes
            elif self.steps > 0:  # the first step is the warm-up
                self.timed, self.seconds = self.timed + 1, self.seconds + seconds
            self.steps += 1
            if self.steps in evaluation_steps(config):
                self._measure()
                control.should_training_stop = self.diverged

        def charges(self, tokens_per_step: int) -> Charges:
            """The cost of the steps."""
            counted = {0: StepCost(**self.figures)} if len(self.figures) == len(fields(StepCost)) else {}
            return Charges(training, counted, tokens_per_step, self.seconds / max(1, self.timed))

    return Watch()
