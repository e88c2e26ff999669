"""Ladder side-tuning: a small network beside the frozen model, and no backward pass through the model.

1. The model runs frozen; the output of every decoder layer is caught on its way.
2. A narrow transformer climbs beside it: at each rung it mixes what it has with that output, brought
   down to its own width, by a learned gate, and runs one small transformer layer.
3. What comes out at the top, brought up to the model's width by a matrix that starts at 0, is
   added to what the model's head reads. So gradients flow through the head's input and the side network alone.

Source: Sung et al. 2022, "LST: Ladder Side-Tuning", arXiv 2206.06522 (figure 2, section 3.1). The side
network starts at random; the paper starts it from pruned weights.
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

    from lockkit.attack.bench import Bench

HEADS = 4


class SideConfig(FinetuneConfig):
    """Settings of `side-network`."""

    reduction: int = Field(4, ge=1, description="How many times narrower than the model the side network is.")


class SideNetwork(GradientAttack):
    """Ladder side-tuning (LST)."""

    name = "side-network"
    description = "A small network beside the frozen model reads its layers: no back-propagation through the model."
    reference = "Sung et al. 2022, arXiv 2206.06522"
    family = "partial training"
    Config = SideConfig
    learning_rate_factor = 3.0
    learning_rate_range = (1e-4, 3e-2)

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Two widths."""
        return [{"reduction": reduction} for reduction in (4, 2)]

    def prepare(self, model: PreTrainedModel, bench: Bench) -> Training:
        """Freeze `model`, and train a ladder beside it."""
        model.requires_grad_(False)
        width = max(HEADS, model.config.hidden_size // self.config.reduction // HEADS * HEADS)
        side = Ladder(model.config.hidden_size, width, len(decoder_layers(model))).to(model.device)
        caught: list[torch.Tensor] = []
        for layer in decoder_layers(model):
            layer.register_forward_hook(lambda _layer, _args, out: caught.append(_hidden(out)))

        def add_side(_head: nn.Module, args: tuple) -> tuple:
            rungs, caught[:] = list(caught), []
            return (args[0] + side(rungs), *args[1:])

        model.get_output_embeddings().register_forward_pre_hook(add_side)
        model.side = side  # a part of the model: its memory counts, and it follows `train` and `eval`
        named = list(side.named_parameters())
        return Training(model, [p for _, p in named], make_optimiser("adamw", named, self.config.learning_rate))


def _hidden(out: torch.Tensor | tuple) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


class Ladder(nn.Module):
    """From the outputs of all decoder layers, `[batch, seq, hidden]` each, to what is added before the head."""

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

    def forward(self, rungs: list[torch.Tensor]) -> torch.Tensor:
        """From one tensor per decoder layer, `[batch, seq, hidden]`, to what is added before the head, of that shape."""
        length = rungs[0].shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=rungs[0].device)
        state = None
        for hidden, norm, down, gate, layer in zip(
            rungs, self.norms, self.down, self.gates.sigmoid(), self.layers, strict=True
        ):
            here = down(norm(hidden))
            state = here if state is None else gate * here + (1 - gate) * state
            state = layer(state, src_mask=mask, is_causal=True)
        return self.up(state)
