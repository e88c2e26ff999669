"""The deep low-rank residual network (DLR-Net) that replaces an MLP.

Source: "Locking Pretrained Weights via Deep Low-Rank Residual Distillation",
arXiv 2605.10777. With `x` the MLP's input, `[..., hidden]`, and L blocks of rank r:

1. The stream starts at `s_0 = 0`.
2. Block l reads `t_l = x + gain * s_l` and computes r units from it:
   gated families `a = act(G_l t_l) * (V_l t_l)`, two-layer families `a = act(V_l t_l + b_l)`.
3. It writes `s_{l+1} = s_l + U_l a`.
4. The output is `s_L`, plus an output bias where the MLP had one.

The ranks of the blocks add up to the MLP's width, so parameters are counted exactly alike.
The three definitions below need PyTorch only; a locked checkpoint carries a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def block_ranks(intermediate_size: int, depth: int) -> list[int]:
    """Divide an MLP's `intermediate_size` hidden units among `depth` blocks.

    Where `depth` does not divide the width, the first blocks get one unit more, so that the
    sum, and with it the parameter count, is always exactly the MLP's.

    Raises:
        ValueError: `depth` is not between 1 and `intermediate_size`.
    """
    if not 1 <= depth <= intermediate_size:
        raise ValueError(f"depth must be between 1 and the MLP's width {intermediate_size}, not {depth}")
    rank, remainder = divmod(intermediate_size, depth)
    return [rank + 1] * remainder + [rank] * (depth - remainder)


class DLRBlock(nn.Module):
    """One low-rank update: `[..., hidden]` to `[..., hidden]` through `rank` units."""

    def __init__(self, hidden_size: int, rank: int, gated: bool, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, rank, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, rank, bias=bias)
        self.down_proj = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, t: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.gate_proj is None:
            units = activation(self.up_proj(t))
        else:
            units = activation(self.gate_proj(t)) * self.up_proj(t)
        return self.down_proj(units)


class DLRNet(nn.Module):
    """A chain of low-rank residual blocks with the interface of an MLP.

    Args:
        hidden_size: width of the stream.
        ranks: units of each block, see `block_ranks`.
        activation: elementwise function of the units.
        gated: gated MLP (gate, up, down), or two layers (up, down).
        bias: the blocks' units have biases.
        output_bias: a bias is added to the output.
        gain: factor of the stream in the blocks' input.
    """

    def __init__(
        self,
        hidden_size: int,
        ranks: list[int],
        activation: Callable[[torch.Tensor], torch.Tensor],
        gated: bool = True,
        bias: bool = False,
        output_bias: bool = False,
        gain: float = 1.0,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(DLRBlock(hidden_size, rank, gated, bias) for rank in ranks)
        self.activation = activation
        self.output_bias = nn.Parameter(torch.zeros(hidden_size)) if output_bias else None
        self.gain = gain

    def forward(self, x: torch.Tensor, gain: float | None = None) -> torch.Tensor:
        """Map `x`, `[..., hidden]`, to `[..., hidden]`.

        `gain` stands in for the chain's own; at 0 all blocks read `x` itself and the chain is an
        ordinary MLP cut into groups of units. Distillation raises it from 0; inference never sets it.
        """
        gain = self.gain if gain is None else gain
        first, *others = self.blocks
        stream = first(x, self.activation)
        for block in others:
            stream = stream + block(torch.add(x, stream, alpha=gain), self.activation)
        return stream if self.output_bias is None else stream + self.output_bias
