"""Training a part of the model: everything but the chains, or only the last layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import make_optimiser
from lockkit.models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


def _training(model: PreTrainedModel, rate: float) -> Training:
    trained = [p for p in model.parameters() if p.requires_grad]
    return Training(model, trained, make_optimiser("adamw", model.named_parameters(), rate))


class FrozenDLR(GradientAttack):
    """Attention-only fine-tuning. Its cost bounds what any lock of this shape can add (ratios.py)."""

    name = "frozen-dlr"
    description = "Train attention, embeddings and norms, but not the chains (on the original, the MLPs)."
    reference = "this project"
    family = "partial training"
    lock_aware = True
    in_quick = True
    quick_rate_from = "full-ft"

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Without and with reversal, which then keeps only the units of a chain."""
        return [{}, {"saver": "reversal"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Freeze the chains or MLPs of `model`, and train the rest."""
        for layer in decoder_layers(model):
            layer.mlp.requires_grad_(False)
        return _training(model, self.config.learning_rate)


class LastLayersConfig(FinetuneConfig):
    """Settings of `last-layers`."""

    layers: int = Field(1, ge=1, description="Number of last decoder layers to train.")


class LastLayers(GradientAttack):
    """Only the last decoder layers are trained."""

    name = "last-layers"
    description = "Train only the last decoder layers: no back-propagation through the others."
    reference = "Lee et al. 2019, arXiv 1911.03090"
    family = "partial training"
    Config = LastLayersConfig
    config: LastLayersConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Several numbers of layers."""
        return [{"layers": layers} for layers in (1, 2, 4)]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Freeze all of `model` but its last layers."""
        model.requires_grad_(False)
        for layer in list(decoder_layers(model))[-self.config.layers :]:
            layer.requires_grad_(True)
        return _training(model, self.config.learning_rate)
