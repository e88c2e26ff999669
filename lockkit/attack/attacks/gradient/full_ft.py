"""Fine-tuning of all weights with AdamW (the baseline) or another optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import OPTIMISERS, make_optimiser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


class FullFinetune(GradientAttack):
    """All weights with AdamW."""

    name = "full-ft"
    description = "All weights with AdamW: the baseline that every other attack is compared with."
    reference = "Loshchilov and Hutter 2019, arXiv 1711.05101"
    family = "baseline"
    in_quick = True

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights of `model` with AdamW."""
        named = list(model.named_parameters())
        optimiser = make_optimiser("adamw", named, self.config.learning_rate)
        return Training(model, [p for _, p in named], optimiser)


class OptimizersConfig(FinetuneConfig):
    """Settings of `optimizers`."""

    optimiser: Literal["sgd", "nesterov", "adafactor", "muon", "soap", "schedule-free"] = Field(
        "muon", description="The optimiser; see optimisers.py."
    )


class Optimizers(GradientAttack):
    """All weights with another optimiser."""

    name = "optimizers"
    description = "All weights with SGD, Nesterov, Adafactor, Muon, SOAP or schedule-free AdamW."
    reference = "Muon: arXiv 2502.16982; SOAP: 2409.11321; schedule-free: 2405.15682; Adafactor: 1804.04235"
    family = "optimisation"
    Config = OptimizersConfig
    config: OptimizersConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """One optimiser each, with the factor of its learning rates."""
        order = ["schedule-free", "nesterov", "sgd", "adafactor", "soap", "muon"]
        return [{"optimiser": name, "learning_rate_factor": OPTIMISERS[name].rate_factor} for name in order]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights of `model` with the chosen optimiser.

        Raises:
            CannotRun: its package is not installed.
        """
        named = list(model.named_parameters())
        config = self.config
        return Training(
            model,
            [p for _, p in named],
            make_optimiser(config.optimiser, named, config.learning_rate),
        )
