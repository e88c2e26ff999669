"""Fine-tuning with Hugging Face's `Trainer`.

- `trainer` is the baseline in this second, independent loop. Rows and their order, optimiser, schedule and clipping are
  the same; only the loop differs. If a lock resisted one loop and not the other, lockkit's own loop would have a mistake.
- `hf-full`, `hf-lora` and `hf-qlora` are the scripts of the documentation: the optimiser, schedule and settings that
  `TrainingArguments`, peft and bitsandbytes have by default or in their examples. Three things are the audit's, because
  they are the same for all attacks: the batch, the precision of computation, and a learning rate that was searched.
  peft's pages have adapters on some projections of attention; its section on QLoRA has them on all linear layers. Both
  are tried. A rank on all linear layers is tried at two capacities, as in adapters.py: one of them is the page's on the
  original, the other the page's on the lock. Attackers of this kind know nothing about the lock.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from lockkit.attack.attacks.gradient.adapters import CapacityOf, matched_rank, quantise
from lockkit.attack.base import CannotRun, GradientAttack
from lockkit.attack.cost import LiveTensors, ProcessMemory, SavedTensors, StepCost, flop_counter
from lockkit.attack.finetune import (
    BROKEN,
    TIMED_STEPS,
    Charges,
    FinetuneConfig,
    FinetuneResult,
    Training,
    batches,
    ends_early,
    evaluation_steps,
    is_beaten,
    quartiles,
    tensors_of,
    trained_parameters,
)
from lockkit.attack.losses import held_out_loss
from lockkit.attack.optimisers import make_optimiser, optional_package
from lockkit.attack.savers import saver
from lockkit.attack.tasks import Task
from lockkit.devices import synchronise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from lockkit.attack.subjects import Subjects

FLOPS_STEP, LIVE_STEP, SAVED_STEP = 1, 2, 3  # steps with one counter each, as in cost.measure_step
Counter = FlopCounterMode | LiveTensors | SavedTensors


class TrainerFinetune(GradientAttack):
    """The baseline's steps, driven by `transformers.Trainer`."""

    name = "trainer"
    description = "All weights with AdamW through Hugging Face's Trainer: the baseline in an independent training loop."
    reference = "transformers, Trainer"
    family = "baseline"
    rate_from = "full-ft"

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights of `model` with AdamW."""
        named, config = list(model.named_parameters()), self.config
        return Training(model, [p for _, p in named], make_optimiser("adamw", named, config.learning_rate))

    def run(self, model: PreTrainedModel, subjects: Subjects, task: Task) -> FinetuneResult:
        """Fine-tune with the Trainer. Costs are counted as in `finetune`.

        Raises:
            FloatingPointError: the held-out loss is not finite before the first step.
        """
        import transformers

        config = self.config
        torch.manual_seed(config.seed)  # for new weights, such as adapters
        training = self.prepare(model, subjects)
        rows = [
            {"input_ids": ids, "labels": labels}
            for batch in batches(task.train, config.batch_rows, config.steps, config.seed)
            for ids, labels in zip(*batch, strict=True)
        ]
        watch = _watch(training, task, config, subjects.device)
        if watch.diverged:
            raise FloatingPointError(BROKEN)
        trained = trained_parameters(training.parameters)
        with (
            tempfile.TemporaryDirectory() as folder,
            saver(config.saver, training.model),
            ProcessMemory(subjects.device) as memory,
        ):
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=config.batch_rows,
                max_steps=config.steps,
                max_grad_norm=config.max_gradient_norm,
                train_sampling_strategy="sequential",
                use_cpu=subjects.device.type == "cpu",
                seed=config.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                learning_rate=config.learning_rate,
                **self.arguments(),
            )
            schedule = None
            if training.optimiser is not None:
                schedule = torch.optim.lr_scheduler.LambdaLR(training.optimiser, config.learning_rate_share)
            trainer = transformers.Trainer(
                training.model,
                arguments,
                train_dataset=rows,
                optimizers=(training.optimiser, schedule),
                callbacks=[watch],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            if training.optimiser is None:
                training.optimiser = trainer.create_optimizer()
            trainer.train()
        charges = watch.charges(config.batch_rows * task.train.ids.shape[1])
        curve = [charges.point(step, loss) for step, loss in watch.measured]
        measurable = not watch.diverged and not is_beaten(config, *watch.measured[-1])
        general = held_out_loss(training.model, subjects.general, subjects.device) if measurable else None
        cost, times = charges.total(watch.steps, memory), quartiles(watch.seconds)
        return FinetuneResult(curve, cost, watch.diverged, dict(training.notes), trained, times, general)

    def arguments(self) -> dict[str, Any]:
        """Further arguments of the Trainer."""
        return {}


class ScriptConfig(FinetuneConfig):
    """Settings of a script of the documentation."""

    schedule: Literal["linear"] = Field("linear", description="Course of the learning rate.")  # type: ignore[assignment]
    gradient_checkpointing: bool = Field(False, description="The Trainer's option of this name.")


class HFFull(TrainerFinetune):
    """Full fine-tuning as the documentation of transformers shows it."""

    name = "hf-full"
    description = "Hugging Face's Trainer with its defaults, all weights; also with gradient checkpointing."
    reference = "transformers documentation, Fine-tuning"
    family = "off the shelf"
    off_the_shelf = True
    in_quick = True
    Config = ScriptConfig
    config: ScriptConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Without and with gradient checkpointing."""
        return [{"gradient_checkpointing": checkpointing} for checkpointing in (False, True)]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights of `model`. The Trainer makes the optimiser."""
        return Training(model, list(model.parameters()), None)

    def arguments(self) -> dict[str, Any]:
        """The defaults, and gradient checkpointing."""
        if not self.config.gradient_checkpointing:
            return {}
        import transformers

        known = transformers.TrainingArguments.__dataclass_fields__  # the option has a new name since transformers 5
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class AdapterScriptConfig(ScriptConfig):
    """Settings of a script with adapters."""

    layers: Literal["all-linear", "attention"] = Field(
        "all-linear", description="The layers with adapters: all linear ones, or the projections that the page names."
    )
    capacity_of: CapacityOf = Field("itself", description="The model on which the page's rank is used as it is.")


class HFLora(HFFull):
    """LoRA as the quicktour of peft shows it."""

    name = "hf-lora"
    description = (
        "peft's LoRA as its quicktour shows it, on all linear layers or on queries; also with gradient checkpointing."
    )
    reference = "peft documentation, Quicktour"
    rate_from = "lora"
    learning_rate_factor = 5.0
    Config = AdapterScriptConfig
    config: AdapterScriptConfig
    adapter: ClassVar[dict[str, Any]] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    attention: ClassVar[list[str]] = ["q_proj"]
    quick_variants = 2

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Both choices of layers, without and with gradient checkpointing; the first also at the other capacity."""
        linear, attention = {"layers": "all-linear"}, {"layers": "attention"}
        return [
            linear | {"capacity_of": "locked"},
            linear | {"capacity_of": "original"},
            linear | {"capacity_of": "locked", "gradient_checkpointing": True},
            attention,
            attention | {"gradient_checkpointing": True},
        ]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Add adapters to `model`.

        Raises:
            CannotRun: peft is not installed, or the model has no layers with the names that the page has.
        """
        peft = optional_package("peft")
        layers: str | list[str] = self.config.layers
        if layers == "attention":
            layers = self.attention
            if missing := set(layers) - {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}:
                raise CannotRun(f"the model has no layers called {', '.join(sorted(missing))}")
        page = self.adapter["r"]
        rank = matched_rank(model, page, self.config.capacity_of, subjects)
        scaled = self.adapter | {"r": rank, "lora_alpha": self.adapter["lora_alpha"] * rank / page}  # the same scale
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers, **scaled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name in transformers
            model = peft.get_peft_model(model, settings)
        return Training(model, [p for p in model.parameters() if p.requires_grad], None, notes={"rank_used": rank})


class HFQLora(HFLora):
    """QLoRA as the documentation of peft shows it."""

    name = "hf-qlora"
    description = "QLoRA as peft's page on quantisation shows it; also with gradient checkpointing."
    reference = "peft documentation, Quantization"
    in_quick = False
    adapter: ClassVar[dict[str, Any]] = {"r": 16, "lora_alpha": 8, "lora_dropout": 0.05}
    attention: ClassVar[list[str]] = ["q_proj", "k_proj", "v_proj", "o_proj"]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Quantise `model` to 4 bits, prepare it as peft does, and add adapters.

        Raises:
            CannotRun: peft or bitsandbytes is missing, or bitsandbytes has no kernels for this device.
        """
        peft = optional_package("peft")
        quantise(model)
        checkpointing = self.config.gradient_checkpointing
        return super().prepare(
            peft.prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            ),
            subjects,
        )


def _watch(training: Training, task: Task, config: FinetuneConfig, device: torch.device) -> TrainerCallback:
    """A callback that counts, times and evaluates as `finetune` does."""
    import transformers

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.steps, self.diverged, self.ended = 0, False, False
            self.seconds: list[float] = []  # of each timed step
            self.measured: list[tuple[int, float]] = []  # steps, held-out loss
            self.figures: dict[str, Any] = {}  # of one step: the fields of `StepCost`
            self.counter: Counter | None = None
            self._measure()

        def _measure(self) -> None:
            loss = held_out_loss(training.model, task.held_out, device)
            self.diverged = not math.isfinite(loss)
            if not self.diverged:
                self.measured.append((self.steps, loss))
                self.ended = ends_early(config, self.steps, loss)

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
                self.seconds.append(seconds)
            self.steps += 1
            if self.steps in evaluation_steps(config) and not self.ended:
                self._measure()
            control.should_training_stop = self.diverged or (self.ended and len(self.seconds) >= TIMED_STEPS)

        def charges(self, tokens_per_step: int) -> Charges:
            """The cost of the steps."""
            counted = {0: StepCost(**self.figures)} if len(self.figures) == len(fields(StepCost)) else {}
            return Charges(training, counted, tokens_per_step, quartiles(self.seconds)[1])

    return Watch()
