"""Training a part of the model: all but the chains, or the last layers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import make_optimiser
from lockkit.models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.bench import Bench


def _training(model: PreTrainedModel, rate: float) -> Training:
    trained = [p for p in model.parameters() if p.requires_grad]
    return Training(model, trained, make_optimiser("adamw", model.named_parameters(), rate))


class FrozenDLR(GradientAttack):
    """Attention-only fine-tuning: a bound on what any lock can cost (summary.py)."""

    name = "frozen-dlr"
    description = "Train attention, embeddings and norms; never the chains (on the original: never the MLPs)."
    reference = "this project"
    family = "partial training"
    lock_aware = True

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Without and with reversal, which then saves nothing of a chain but its units."""
        return [{}, {"saver": "reversal"}]

    def prepare(self, model: PreTrainedModel, bench: Bench) -> Training:
        """Freeze the chains (MLPs) of `model`; train the rest."""
        for layer in decoder_layers(model):
            layer.mlp.requires_grad_(False)
        return _training(model, self.config.learning_rate)


class LastLayersConfig(FinetuneConfig):
    """Settings of `last-layers`."""

    layers: int = Field(1, ge=1, description="How many of the last decoder layers are trained.")


class LastLayers(GradientAttack):
    """Only the last decoder layers are trained."""

    name = "last-layers"
    description = "Train the last decoder layers alone: no back-propagation through the others."
    reference = "Lee et al. 2019, arXiv 1911.03090"
    family = "partial training"
    in_quick = True
    Config = LastLayersConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Several numbers of layers."""
        return [{"layers": layers} for layers in (1, 2, 4)]

    def prepare(self, model: PreTrainedModel, bench: Bench) -> Training:
        """Freeze all of `model` but its last layers."""
        model.requires_grad_(False)
        for layer in list(decoder_layers(model))[-self.config.layers :]:
            layer.requires_grad_(True)
        return _training(model, self.config.learning_rate)
