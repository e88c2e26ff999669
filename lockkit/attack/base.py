"""The three kinds of attacks.

An attack is a class in a module of `lockkit/attack/attacks/`: that file is all it takes to add one (registry.py
finds it).

- A *gradient attack* says how to train: it turns a model into a `Training` (finetune.py). The
  runner fine-tunes the original with it first (positive control), then the lock.
- An *unlock* turns the lock into a model that is cheaper to train. The runner first applies it to the original
  rewritten as a chain (positive control), then to the lock. The unlocked model is fine-tuned with all weights
  (selection.py says where with what else). Unlock and fine-tune are both charged.
- A *probe* measures something and trains nothing (controls; whether an export can be undone).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel

from lockkit.attack.finetune import FinetuneConfig, FinetuneResult, Training, finetune

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel

    from lockkit.attack.bench import Bench
    from lockkit.attack.config import AuditConfig
    from lockkit.attack.cost import Cost
    from lockkit.attack.tasks import Task


class CannotRun(Exception):
    """The attack cannot run here: a package or a device is missing. The reason goes into its row."""


class Attack(ABC):
    """Common to all attacks. `config` holds the settings of one run."""

    name: ClassVar[str]
    description: ClassVar[str]  # one line
    reference: ClassVar[str]
    family: ClassVar[str]  # what it attacks: optimisation, memory, architecture, ...
    lock_aware: ClassVar[bool] = False  # uses what is known of this lock
    in_quick: ClassVar[bool] = False  # stands for its family in the quick suite
    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: BaseModel):
        self.config = config

    @classmethod
    @abstractmethod
    def trials(cls, audit: AuditConfig) -> list[BaseModel]:
        """The settings that the suite tries, the same for the lock as for the original."""

    @classmethod
    def suggest(cls, trial: optuna.Trial, audit: AuditConfig) -> BaseModel | None:
        """Settings proposed by a search; None if there is nothing to search."""
        return None


class GradientAttack(Attack):
    """Fine-tunes a model."""

    Config: ClassVar[type[FinetuneConfig]] = FinetuneConfig
    learning_rate_factor: ClassVar[float] = 1.0  # of the suite's rates, for optimisers that need others
    learning_rate_range: ClassVar[tuple[float, float]] = (1e-5, 1e-2)
    quick_variants: ClassVar[int] = 1

    @abstractmethod
    def prepare(self, model: PreTrainedModel, bench: Bench) -> Training:
        """Say what is trained, and how.

        Args:
            model: a copy for this run alone, in float32, every weight trainable.

        Raises:
            CannotRun: a package or a device is missing.
        """

    def run(self, model: PreTrainedModel, bench: Bench, task: Task) -> FinetuneResult:
        """Fine-tune `model` on `task`: through `finetune`, unless the attack has a loop of its own."""
        torch.manual_seed(self.config.seed)  # of new weights, such as adapters
        return finetune(self.prepare(model, bench), task, self.config)

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Settings besides learning rates and budget that the suites try; the first is the main one."""
        return [{}]

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[FinetuneConfig]:
        """The suite's variants, each at every learning rate of the suite."""
        variants = cls.variants()[: cls.quick_variants if audit.suite == "quick" else None]
        return [cls.configured(audit, variant, rate) for variant in variants for rate in audit.learning_rates]

    @classmethod
    def configured(cls, audit: AuditConfig, variant: dict[str, Any], rate: float) -> FinetuneConfig:
        """Settings of one run.

        Args:
            variant: settings as `variants` gives them; `learning_rate_factor` among them replaces the attack's.
            rate: learning rate of the suite, before that factor.
        """
        budget = {"steps": audit.steps, "batch_rows": audit.batch_rows, "seed": audit.seed}
        factor = variant.get("learning_rate_factor", cls.learning_rate_factor)
        settings = {key: value for key, value in variant.items() if key != "learning_rate_factor"}
        return cls.Config(**(budget | {"learning_rate": rate * factor} | settings))

    @classmethod
    def suggest(cls, trial: optuna.Trial, audit: AuditConfig) -> FinetuneConfig:
        """A variant, a learning rate, a warm-up and a schedule."""
        variants = cls.variants()
        variant = variants[trial.suggest_int("variant", 0, len(variants) - 1) if len(variants) > 1 else 0]
        rate = trial.suggest_float("learning_rate", *cls.learning_rate_range, log=True)
        config = cls.configured(audit, variant, rate)
        return config.model_copy(
            update={
                "warm_up": trial.suggest_categorical("warm_up", [0, audit.steps // 8, audit.steps // 4]),
                "schedule": trial.suggest_categorical("schedule", ["constant", "cosine"]),
            }
        )


@dataclass
class Unlocked:
    """The unlocked model and its cost."""

    model: PreTrainedModel
    blocks: int  # 1: an ordinary model of the original architecture; more: a chain of that many
    cost: Cost
    notes: dict = field(default_factory=dict)


class UnlockAttack(Attack):
    """Turns the lock into a model that is cheaper to train."""

    lock_aware = True
    family = "architecture"
    # The control must win back this share of the KL divergence that an original without its MLPs has.
    control_share: ClassVar[float] = 0.9

    @abstractmethod
    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Turn `locked`, frozen and in float32, into another model. Must not use the original.

        Raises:
            CannotRun: the lock's shape, a package or a device does not allow it.
        """


class Probe(Attack):
    """Measures something, and trains nothing."""

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[BaseModel]:
        """One measurement, with the default settings."""
        return [cls.Config()]

    @abstractmethod
    def probe(self, bench: Bench) -> dict:
        """Figures for its row; the entry "passed", if there is one, says whether the attack succeeded."""


class NoSettings(BaseModel):
    """For attacks without any."""
