"""Ladder side-tuning: a small network beside the frozen model, and no backward pass through the model.

1. The frozen model runs, and the output of every decoder layer is recorded.
2. A narrow side network has one small transformer layer ("rung") for each decoder layer. The input of a rung is a mix
   of the rung before and the decoder layer's output, projected to the network's width, with a learned gate.
3. The output of the last rung is projected to the model's width by a matrix that starts at 0, and added to the input
   of the model's head. So gradients flow only through the head's input and the side network.

Source: Sung et al. 2022, "LST: Ladder Side-Tuning", arXiv 2206.06522 (figure 2, section 3.1). Here the side
network starts from random weights; in the paper it starts from pruned weights of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import make_optimiser
from lockkit.models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects

HEADS = 4


class SideConfig(FinetuneConfig):
    """Settings of `side-network`."""

    reduction: int = Field(4, ge=1, description="The width of the model over that of the side network.")


class SideNetwork(GradientAttack):
    """Ladder side-tuning (LST)."""

    name = "side-network"
    description = "Train a small network that reads the frozen model's layers: no back-propagation through the model."
    reference = "Sung et al. 2022, arXiv 2206.06522"
    family = "partial training"
    Config = SideConfig
    config: SideConfig
    learning_rate_factor = 3.0
    learning_rate_range = (1e-4, 3e-2)

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Two widths."""
        return [{"reduction": reduction} for reduction in (4, 2)]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Freeze `model` and train a side network."""
        model.requires_grad_(False)
        width = max(HEADS, model.config.hidden_size // self.config.reduction // HEADS * HEADS)
        side = Ladder(model.config.hidden_size, width, len(decoder_layers(model))).to(model.device)
        outputs: list[torch.Tensor] = []
        for layer in decoder_layers(model):
            layer.register_forward_hook(lambda _layer, _args, out: outputs.append(_hidden(out)))

        def add_side(_head: nn.Module, args: tuple) -> tuple:
            recorded, outputs[:] = list(outputs), []
            return (args[0] + side(recorded), *args[1:])

        model.get_output_embeddings().register_forward_pre_hook(add_side)
        model.side = side  # as a part of the model, so that its memory counts and `train` and `eval` reach it
        named = list(side.named_parameters())
        return Training(model, [p for _, p in named], make_optimiser("adamw", named, self.config.learning_rate))


def _hidden(out: torch.Tensor | tuple) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


class Ladder(nn.Module):
    """The side network, see the top of this file.

    Args:
        hidden_size: width of the model.
        width: width of the side network.
        rungs: number of decoder layers of the model.
    """

    def __init__(self, hidden_size: int, width: int, rungs: int):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(hidden_size, width) for _ in range(rungs))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(rungs))
        self.gates = nn.Parameter(torch.zeros(rungs))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(rungs)
        )
        self.up = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The correction of the head's input, `[batch, seq, hidden]`, from the outputs of all decoder layers, same shape."""
        length = outputs[0].shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=outputs[0].device)
        state: torch.Tensor | None = None
        for hidden, norm, down, gate, layer in zip(
            outputs, self.norms, self.down, self.gates.sigmoid(), self.layers, strict=True
        ):
            narrow = down(norm(hidden))
            state = narrow if state is None else gate * narrow + (1 - gate) * state
            state = layer(state, src_mask=mask, is_causal=True)
        return self.up(state)
