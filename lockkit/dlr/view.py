"""Views of a chain: its computation block by block, and its weights side by side as one MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRBlock, DLRNet


class Step(NamedTuple):
    """The computation of one block."""

    block: DLRBlock
    t: torch.Tensor  # the block's input, [..., hidden]
    before: list[torch.Tensor]  # pre-activations: gate and up, or up alone, [..., rank] each
    update: torch.Tensor  # what the block adds to the stream, [..., hidden]
    stream: torch.Tensor  # the stream after the block, [..., hidden]


def walk(chain: DLRNet, x: torch.Tensor) -> Iterator[Step]:
    """Run a chain on `x`, `[..., hidden]`, and yield the step of every block. The output bias is not added."""
    stream: torch.Tensor | None = None
    for block in chain.blocks:
        t = chain.block_input(x, stream)
        before = block.pre_activations(t)
        update = block.down_proj(block.units(before, chain.activation))
        stream = update if stream is None else stream + update
        yield Step(block, t, before, update, stream)


def block_weights(block: DLRBlock) -> MLPWeights:
    """The tensors of a block, not copied, as an MLP without output bias."""
    gate = block.gate_proj
    return MLPWeights(
        up=block.up_proj.weight,
        down=block.down_proj.weight,
        gate=None if gate is None else gate.weight,
        up_bias=block.up_proj.bias,
        gate_bias=None if gate is None else gate.bias,
    )


def side_by_side(chain: DLRNet, first: int = 0, last: int | None = None) -> MLPWeights:
    """The weights of blocks `[first, last)`, concatenated into one MLP that reads the input of block `first`.

    The MLP computes the same as the blocks if they do not depend on each other (gain 0). It has the chain's output bias
    if the last block is among them. The result is differentiable with respect to the chain's weights.
    """
    weights = MLPWeights.side_by_side([block_weights(block) for block in chain.blocks[first:last]])
    if last is None or last == len(chain.blocks):
        weights.down_bias = chain.output_bias
    return weights


@torch.no_grad()
def load_side_by_side(chain: DLRNet, weights: MLPWeights) -> None:
    """The inverse of `side_by_side`: copy an MLP's hidden units into the blocks of a chain, in order.

    At gain 0 the chain then computes the same as the MLP.
    """
    for block, group in zip(chain.blocks, weights.split(chain.ranks), strict=True):
        group.down_bias = None
        block_weights(block).copy_(group)
    if chain.output_bias is not None:
        assert weights.down_bias is not None, "the chain has an output bias and the MLP has none"
        chain.output_bias.copy_(weights.down_bias)
