"""Low-rank adapters on all linear layers: LoRA, LoRA-FA."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lockkit.attack.base import CannotRun, GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import make_optimiser


class LoraConfig(FinetuneConfig):
    rank: int = Field(16, ge=1, description="Rank of the adapters; alpha is twice that.")


def adapted(model, rank: int):
    """The model with adapters on all linear layers but the head, wherever they lie."""
    try:
        import peft
    except ImportError as error:
        raise CannotRun("the package peft is not installed: pip install 'lockkit[attack]'") from error
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    return peft.get_peft_model(model, settings)


class Lora(GradientAttack):
    name = "lora"
    description = "Adapters on all linear layers; the weights stay frozen."
    reference = "Hu et al. 2021, arXiv 2106.09685"
    family = "adapters"
    in_quick = True
    Config = LoraConfig
    learning_rate_factor = 5.0
    learning_rate_range = (1e-4, 3e-2)

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        return [{"rank": rank} for rank in (16, 8, 64)]

    def prepare(self, model, bench) -> Training:
        model = adapted(model, self.config.rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Training(model, trained, make_optimiser("adamw", model.named_parameters(), self.config.learning_rate))


class LoraFA(Lora):
    name = "lora-fa"
    description = "Adapters of which only the second matrix is trained, so that less must be saved."
    reference = "Zhang et al. 2023, arXiv 2308.03303"
    family = "memory"
    in_quick = False

    def prepare(self, model, bench) -> Training:
        model = adapted(model, self.config.rank)
        from peft.optimizers import create_lorafa_optimizer

        rank = self.config.rank
        optimiser = create_lorafa_optimizer(model, r=rank, lora_alpha=2 * rank, lr=self.config.learning_rate)
        return Training(model, [p for p in model.parameters() if p.requires_grad], optimiser)
