"""The deep low-rank residual network (DLR-Net) that replaces an MLP.

Source: "Locking Pretrained Weights via Deep Low-Rank Residual Distillation", arXiv 2605.10777.
With `x` the MLP's input, `[..., hidden]`, and L blocks of rank r:

1. The stream starts at `s_0 = 0`.
2. Block l reads `t_l = x + gain * s_l` and computes r units from it. Gated families:
   `a = act(G_l t_l) * (V_l t_l)`. Two-layer families: `a = act(V_l t_l + b_l)`.
3. The block adds `U_l a` to the stream: `s_{l+1} = s_l + U_l a`.
4. The output is `s_L`, plus an output bias if the MLP has one.

The ranks of the blocks add up to the MLP's width, so the chain has as many parameters as the MLP.
The four definitions below need only PyTorch. Every locked checkpoint contains a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from lockkit.dlr.shape import block_ranks


@dataclass(frozen=True)
class ChainConfig:
    """The settings shared by a model's chains: the entry `dlr` of `config.json`.

    Attributes:
        depth: blocks in each chain.
        gains: per decoder layer, the factor of the stream in a block's input; empty before training.
        activation: name of the activation function in transformers.
        gated: blocks have gate, up and down matrices; otherwise up and down only.
        bias: the units have biases.
        output_bias: the chain adds a bias to its output.

    Raises:
        ValueError: `depth` is not a whole number of at least 1.
    """

    depth: int
    gains: tuple[float, ...]
    activation: str
    gated: bool = True
    bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(f"dlr.depth must be a whole number of at least 1, not {self.depth!r}")
        object.__setattr__(self, "gains", tuple(float(gain) for gain in self.gains))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChainConfig:
        """Read the entry `dlr`. Raises ValueError if an entry is unknown, missing or not valid."""
        names = {field.name: field.default is MISSING for field in fields(cls)}
        if not isinstance(values, Mapping):
            raise ValueError(f"dlr must be an object, not {values!r}")
        wrong = [*(set(values) - set(names)), *(name for name in names if names[name] and name not in values)]
        if wrong:
            raise ValueError(f"dlr has unknown or missing entries: {', '.join(sorted(wrong))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The entry `dlr`, ready for JSON."""
        return asdict(self) | {"gains": list(self.gains)}

    def empty_chain(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        gain: float,
    ) -> DLRNet:
        """An untrained chain with the interface and the parameter count of an MLP of these sizes."""
        ranks = block_ranks(intermediate_size, self.depth)
        return DLRNet(hidden_size, ranks, activation, self.gated, self.bias, self.output_bias, gain)


class DLRBlock(nn.Module):
    """One low-rank update of the stream, computed by `rank` units."""

    def __init__(self, hidden_size: int, rank: int, gated: bool, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, rank, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, rank, bias=bias)
        self.down_proj = nn.Linear(rank, hidden_size, bias=False)

    def pre_activations(self, t: torch.Tensor) -> list[torch.Tensor]:
        """Gate and up, or up alone, `[..., rank]` each; the activation function applies to the first."""
        up = self.up_proj(t)
        return [up] if self.gate_proj is None else [self.gate_proj(t), up]

    @staticmethod
    def units(before: Sequence[torch.Tensor], activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The units, `[..., rank]`, computed from their pre-activations."""
        first, *up = before
        return activation(first) * up[0] if up else activation(first)

    def forward(self, t: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The update, `[..., hidden]`, given the block's input `t`, `[..., hidden]`."""
        return self.down_proj(self.units(self.pre_activations(t), activation))


class DLRNet(nn.Module):
    """A chain of low-rank residual blocks with the interface of an MLP.

    Args:
        hidden_size: width of the stream.
        ranks: number of units in each block, see `block_ranks`.
        activation: elementwise activation function.
        gated: blocks have gate, up and down matrices; otherwise up and down only.
        bias: the units have biases.
        output_bias: the chain adds a bias to its output.
        gain: factor of the stream in a block's input.
    """

    blocks: Sequence[DLRBlock]  # an nn.ModuleList

    def __init__(
        self,
        hidden_size: int,
        ranks: Sequence[int],
        activation: Callable[[torch.Tensor], torch.Tensor],
        gated: bool = True,
        bias: bool = False,
        output_bias: bool = False,
        gain: float = 1.0,
    ):
        super().__init__()
        self.ranks = list(ranks)
        self.add_module("blocks", nn.ModuleList(DLRBlock(hidden_size, rank, gated, bias) for rank in ranks))
        self.activation = activation
        self.output_bias = nn.Parameter(torch.zeros(hidden_size)) if output_bias else None
        self.gain = gain

    def block_input(self, x: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        """The input of a block, `[..., hidden]`. The first block has no stream before it (None) and reads `x`."""
        return x if stream is None else torch.add(x, stream, alpha=self.gain)

    def run_blocks(
        self,
        x: torch.Tensor,
        stream: torch.Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """Run blocks `[first, last)`, at least one, and return the stream after them.

        All tensors are `[..., hidden]`. `stream` is the stream before block `first`, None for the first block.
        """
        for block in self.blocks[first:last]:
            update = block(self.block_input(x, stream), self.activation)
            stream = update if stream is None else stream + update
        assert stream is not None, "no blocks to run"
        return stream

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The chain's output, `[..., hidden]`, for the MLP's input `x`, `[..., hidden]`."""
        stream = self.run_blocks(x)
        return stream if self.output_bias is None else stream + self.output_bias
