"""Looking into a chain: its steps one by one, and its weights side by side as one MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRBlock, DLRNet


class Step(NamedTuple):
    """One block at work on an input of its chain."""

    block: DLRBlock
    t: torch.Tensor  # what the block reads, [..., hidden]
    before: list[torch.Tensor]  # pre-activations: gate and up, or up alone, [..., rank] each
    update: torch.Tensor  # what it adds to the stream, [..., hidden]
    stream: torch.Tensor  # the stream after it, [..., hidden]


def walk(chain: DLRNet, x: torch.Tensor) -> Iterator[Step]:
    """Run a chain on `x`, `[..., hidden]`, and yield every block's step. The output bias is left out."""
    stream: torch.Tensor | None = None
    for block in chain.blocks:
        t = chain.block_input(x, stream)
        before = block.pre_activations(t)
        update = block.down_proj(block.units(before, chain.activation))
        stream = update if stream is None else stream + update
        yield Step(block, t, before, update, stream)


def block_weights(block: DLRBlock) -> MLPWeights:
    """A block's own tensors as an MLP without output bias: no copies."""
    gate = block.gate_proj
    return MLPWeights(
        up=block.up_proj.weight,
        down=block.down_proj.weight,
        gate=None if gate is None else gate.weight,
        up_bias=block.up_proj.bias,
        gate_bias=None if gate is None else gate.bias,
    )


def side_by_side(chain: DLRNet, first: int = 0, last: int | None = None) -> MLPWeights:
    """Blocks `[first, last)` as one MLP that reads the input of block `first`; differentiable.

    It is exact where the blocks do not depend on each other. With the chain's last block comes its output bias.
    """
    weights = MLPWeights.side_by_side([block_weights(block) for block in chain.blocks[first:last]])
    if last is None or last == len(chain.blocks):
        weights.down_bias = chain.output_bias
    return weights


@torch.no_grad()
def load_side_by_side(chain: DLRNet, weights: MLPWeights) -> None:
    """The way back: deal an MLP's hidden units out to the blocks of a chain, in order.

    At gain 0 the chain then computes what the MLP does.
    """
    for block, group in zip(chain.blocks, weights.split(chain.ranks), strict=True):
        group.down_bias = None
        block_weights(block).copy_(group)
    if chain.output_bias is not None:
        chain.output_bias.copy_(weights.down_bias)
