"""The three kinds of attacks.

An attack is a class in a module of `lockkit/attack/attacks/`. To add one, write that module: registry.py finds it.

- A *gradient attack* defines how a model is trained: it turns a model into a `Training` (finetune.py). The
  audit fine-tunes the original with it (positive control) and then the lock.
- An *unlock* turns the lock into a model that is cheaper to train. The audit first applies it to the original
  rewritten as a chain (positive control), then to the lock. The unlocked model is fine-tuned with the baseline, and
  in some cases with other attacks (selection.py). The cost of the unlock is added to that of the fine-tune.
- A *probe* measures something and trains nothing. Examples: held-out losses without fine-tuning, or whether
  the weights can be recovered from an export.

There are two kinds of attackers. One uses scripts *off the shelf*, as their documentation shows them. The other is
*informed*: it knows the method, and does whatever is cheapest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel

from lockkit.attack.finetune import MIN_STEPS, FinetuneConfig, FinetuneResult, Training, finetune

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel

    from lockkit.attack.config import AuditConfig
    from lockkit.attack.cost import Cost
    from lockkit.attack.subjects import Subjects
    from lockkit.attack.tasks import Task


class CannotRun(Exception):
    """The attack cannot run here, because a package or a device is missing. Its row records the reason."""


class Attack(ABC):
    """Common to all attacks. A subclass sets the class attributes below; an instance is one run.

    Attributes:
        name: the attack's name in rows and on the command line.
        description: one line for `lockkit attack --list`.
        reference: the source of the method.
        family: kind of attack, such as `optimisation`, `memory` or `architecture`.
        lock_aware: the attack uses knowledge of the lock (its architecture, its weights, the method).
        needs_chains: the attack works on lockkit's chains. It is left out if the lock has none.
        off_the_shelf: the attack is a published script, as its documentation shows it.
        in_quick: the attack is part of the suite `quick`.
        Config: class of the settings.
        config: settings of this run.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    reference: ClassVar[str]
    family: ClassVar[str]
    lock_aware: ClassVar[bool] = False
    needs_chains: ClassVar[bool] = False
    off_the_shelf: ClassVar[bool] = False
    in_quick: ClassVar[bool] = False
    Config: ClassVar[type[BaseModel]]
    config: BaseModel

    def __init__(self, config: BaseModel):
        self.config = config

    @classmethod
    def suggest(cls, trial: optuna.Trial, audit: AuditConfig) -> BaseModel | None:
        """The settings of one trial of a search; None if the attack has no settings to search."""
        return None


class GradientAttack(Attack):
    """Fine-tunes a model.

    Attributes:
        learning_rate_factor: learning rates are multiplied by this, for optimisers that need others than AdamW.
        rate_from: name of an attack whose best learning rate this one uses; None for a search of its own.
        quick_rate_from: the same, in the suite `quick` only.
        learning_rate_range: lowest and highest learning rate of a search.
        quick_variants: number of variants that the suite `quick` tries.
    """

    Config: ClassVar[type[FinetuneConfig]] = FinetuneConfig
    config: FinetuneConfig
    learning_rate_factor: ClassVar[float] = 1.0
    rate_from: ClassVar[str | None] = None
    quick_rate_from: ClassVar[str | None] = None
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)
    quick_variants: ClassVar[int] = 1

    @abstractmethod
    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Set up the training of `model`: which weights, with which optimiser.

        Args:
            model: a copy that belongs to this run, in float32, all weights trainable.

        Raises:
            CannotRun: a package or a device is missing.
        """

    def run(self, model: PreTrainedModel, subjects: Subjects, task: Task) -> FinetuneResult:
        """Fine-tune `model` on `task` with `finetune`. An attack with its own training loop overrides this."""
        torch.manual_seed(self.config.seed)  # for new weights, such as adapters
        return finetune(self.prepare(model, subjects), task, self.config, general=subjects.general)

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Settings that the suites try, besides learning rates and budget. The first is the main variant."""
        return [{}]

    @classmethod
    def suite_variants(cls, audit: AuditConfig) -> list[dict[str, Any]]:
        """The variants of this audit's suite, the same on the lock and on the original."""
        return cls.variants()[: cls.quick_variants if audit.suite == "quick" else None]

    @classmethod
    def rate_source(cls, audit: AuditConfig) -> str | None:
        """The name of the attack whose best learning rate this one uses in this audit; None for a search of its own."""
        return cls.rate_from or (cls.quick_rate_from if audit.suite == "quick" else None)

    @classmethod
    def configured(cls, audit: AuditConfig, variant: dict[str, Any], rate: float) -> FinetuneConfig:
        """Settings of one run.

        Args:
            variant: an entry of `variants`. Its `learning_rate_factor`, if any, replaces the attack's.
            rate: learning rate for AdamW, to be multiplied by that factor.
        """
        budget = {"steps": audit.steps, "batch_rows": audit.batch_rows, "seed": audit.seed}
        factor = variant.get("learning_rate_factor", cls.learning_rate_factor)
        settings = {key: value for key, value in variant.items() if key != "learning_rate_factor"}
        return cls.Config(**(budget | {"learning_rate": rate * factor} | settings))

    @classmethod
    def suggest(cls, trial: optuna.Trial, audit: AuditConfig) -> FinetuneConfig:
        """Choose a variant, a learning rate, rows per step, a warm-up and a schedule. The tokens of a run stay the same."""
        variants = cls.variants()
        variant = variants[trial.suggest_int("variant", 0, len(variants) - 1) if len(variants) > 1 else 0]
        rate = trial.suggest_float("learning_rate", *cls.learning_rate_range, log=True)
        config = cls.configured(audit, variant, rate)
        times = trial.suggest_categorical("batch_times", [1, 2, 4])
        steps = max(MIN_STEPS, audit.steps // times)
        return config.model_copy(
            update={
                "batch_rows": audit.batch_rows * times,
                "steps": steps,
                "warm_up": int(steps * trial.suggest_categorical("warm_up_share", [0.0, 0.125, 0.25])),
                "schedule": trial.suggest_categorical("schedule", ["constant", "cosine"]),
            }
        )


@dataclass
class Unlocked:
    """The unlocked model and its cost."""

    model: PreTrainedModel
    blocks: int  # 1: an ordinary model of the original architecture; more: a locked model of this depth
    cost: Cost
    notes: dict[str, Any] = field(default_factory=dict)


class UnlockAttack(Attack):
    """Turns the lock into a model that is cheaper to train.

    Attributes:
        control_share: the positive control passes if the unlock removes at least this share of the KL divergence
            between the original and the original without its MLPs (unlocking.py).
    """

    lock_aware = True
    needs_chains = True
    family = "architecture"
    control_share: ClassVar[float] = 0.9

    @classmethod
    @abstractmethod
    def trials(cls, audit: AuditConfig) -> Sequence[BaseModel]:
        """The settings that the suite tries."""

    @abstractmethod
    def unlock(self, locked: PreTrainedModel, subjects: Subjects) -> Unlocked:
        """Build an unlocked model.

        Args:
            locked: the lock, frozen and in float32.
            subjects: text, tasks and settings. An unlock must not read the original from it.

        Raises:
            CannotRun: the lock's shape does not allow it, or a package or a device is missing.
        """


class Probe(Attack):
    """Measures something and trains nothing."""

    @classmethod
    def trials(cls, audit: AuditConfig) -> Sequence[BaseModel]:
        """One measurement with the default settings."""
        return [cls.Config()]

    @abstractmethod
    def probe(self, subjects: Subjects) -> dict[str, Any]:
        """The figures for the row. The entry "passed", if there is one, is whether the attack succeeded."""


class NoSettings(BaseModel):
    """For attacks without settings."""
