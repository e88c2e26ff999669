"""The MLP that a chain replaces: its sizes and weights. It is gated, or has two layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lockkit.dlr.net import ChainConfig, DLRBlock
from lockkit.dlr.shape import MLPShape

Activation = Callable[[torch.Tensor], torch.Tensor]
# The dimension of each tensor that counts the hidden units. `down_bias` has none.
_UNIT_DIM = {"gate": 0, "gate_bias": 0, "up": 0, "up_bias": 0, "down": 1}


def chains_for(shape: MLPShape, depth: int, activation: str, gains: Sequence[float] = ()) -> ChainConfig:
    """The settings of chains of `depth` blocks that replace such MLPs. `gains` is empty before training."""
    return ChainConfig(depth, tuple(gains), activation, shape.gated, shape.bias, shape.output_bias)


@dataclass
class MLPWeights:
    """The weights of one MLP, `[out, in]` as in `nn.Linear`. None: the MLP does not have this tensor."""

    up: torch.Tensor  # [intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]
    gate: torch.Tensor | None = None  # [intermediate, hidden]
    up_bias: torch.Tensor | None = None  # [intermediate]
    gate_bias: torch.Tensor | None = None  # [intermediate]
    down_bias: torch.Tensor | None = None  # [hidden]

    @property
    def shape(self) -> MLPShape:
        """The sizes of the MLP."""
        return MLPShape(
            hidden_size=self.up.shape[1],
            intermediate_size=self.up.shape[0],
            gated=self.gate is not None,
            bias=self.up_bias is not None,
            output_bias=self.down_bias is not None,
        )

    def pre_activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gate and up, or up alone, `[..., intermediate]` each, for `x`, `[..., hidden]`."""
        up = F.linear(x, self.up, self.up_bias)
        return [up] if self.gate is None else [F.linear(x, self.gate, self.gate_bias), up]

    def units(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """The hidden units, `[..., intermediate]`, for `x`, `[..., hidden]`."""
        return DLRBlock.units(self.pre_activations(x), activation)

    def output(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """The MLP's output, `[..., hidden]`, for `x`, `[..., hidden]`."""
        return F.linear(self.units(x, activation), self.down, self.down_bias)

    def select(self, units: torch.Tensor) -> MLPWeights:
        """The MLP of the hidden units with indices `units`, `[count]`, in this order."""
        chosen: dict[str, Any] = {
            name: value if value is None else value.index_select(_UNIT_DIM[name], units.to(value.device))
            for name, value in vars(self).items()
            if name != "down_bias"
        }
        return MLPWeights(**chosen, down_bias=self.down_bias)

    def split(self, counts: Sequence[int]) -> list[MLPWeights]:
        """Split the hidden units into groups of `counts` units. The last group gets the output bias."""
        parts: dict[str, Any] = {
            name: [None] * len(counts) if value is None else value.split(list(counts), _UNIT_DIM[name])
            for name, value in vars(self).items()
            if name != "down_bias"
        }
        groups = [MLPWeights(**{name: part[index] for name, part in parts.items()}) for index in range(len(counts))]
        groups[-1].down_bias = self.down_bias
        return groups

    @staticmethod
    def side_by_side(groups: Sequence[MLPWeights]) -> MLPWeights:
        """Concatenate groups into one MLP, in order. The output bias is the last group's. Differentiable."""
        joined: dict[str, Any] = {
            name: None if getattr(groups[0], name) is None else torch.cat([getattr(g, name) for g in groups], dim)
            for name, dim in _UNIT_DIM.items()
        }
        return MLPWeights(**joined, down_bias=groups[-1].down_bias)

    @torch.no_grad()
    def copy_(self, other: MLPWeights) -> None:
        """Copy every tensor of `other` that is not None into the tensor of the same name, in place."""
        for name, value in vars(other).items():
            if value is not None:
                getattr(self, name).copy_(value)
