"""Initial weights of a chain: the teacher's units, or noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import block_weights, load_side_by_side

if TYPE_CHECKING:
    import numpy as np


@torch.no_grad()
def start_from_teacher(chain: DLRNet, weights: MLPWeights, inputs: torch.Tensor) -> None:
    """Divide the teacher's hidden units among the blocks: units with heavy tails go into the last blocks.

    At gain 0 the chain then computes the same as the teacher. At other gains, a unit disturbs all blocks after its own.
    A unit that is rarely active, and then strongly, is no linear function of the input, so least_squares.py cannot undo
    its effect on them. The measure of the tail is the kurtosis, E[a^4] / E[a^2]^2.

    Args:
        chain: changed in place.
        weights: the teacher's.
        inputs: a sample of the teacher's inputs, `[tokens, hidden]`.
    """
    squares = weights.units(inputs, chain.activation).double().square()
    kurtosis = squares.square().mean(0) / squares.mean(0).square()
    order = kurtosis.nan_to_num(nan=0.0).argsort(stable=True)  # NaN: the unit is never active
    load_side_by_side(chain, weights.select(order))


@torch.no_grad()
def start_from_noise(chain: DLRNet, inputs: torch.Tensor, outputs: torch.Tensor, seed: int) -> None:
    """Draw Gaussian weights. Pre-activations then have rms 1, and outputs have about the rms of the teacher's.

    Args:
        chain: changed in place.
        inputs, outputs: a sample of the teacher's inputs and outputs, `[tokens, hidden]` each.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    input_norm = inputs.float().norm(dim=-1).mean().item() or 1.0
    output_rms = outputs.float().square().mean().sqrt().item()
    width = sum(chain.ranks)
    for weights in map(block_weights, chain.blocks):
        for matrix in (weights.gate, weights.up):
            if matrix is not None:
                matrix.copy_(_normal(matrix, generator, 1 / input_norm))
        for bias in (weights.gate_bias, weights.up_bias):
            if bias is not None:
                bias.zero_()
        weights.down.copy_(_normal(weights.down, generator, output_rms / width**0.5))
    if chain.output_bias is not None:
        chain.output_bias.copy_(outputs.float().mean(0))


@torch.no_grad()
def set_to_zero(chain: DLRNet) -> None:
    """Make the output of a chain, and of each of its blocks, zero. Training leaves such blocks as they are."""
    for block in chain.blocks:
        block_weights(block).down.zero_()
    if chain.output_bias is not None:
        chain.output_bias.zero_()


def _normal(like: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device) * std


@torch.no_grad()
def scrub_teacher_rows(chain: DLRNet, weights: MLPWeights, seed: int) -> int:
    """Perturb rows of gate and up and columns of down that are still bit-identical to the teacher's, and not zero.

    Training changes nearly all of them. It does not change units without a gradient (units that are never active), and
    rounding to a 16-bit dtype can undo a small step. Such rows get noise of 1 % of their rms.

    Args:
        chain: changed in place; in the dtype that will be saved, since rows are compared in it.
        weights: the teacher's.
        seed: of the noise.

    Returns:
        The number of rows and columns that were changed.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [block_weights(block) for block in chain.blocks]
    dtype = blocks[0].up.dtype
    changed = 0
    for name, teacher in (("up", weights.up), ("gate", weights.gate), ("down", weights.down.T)):
        if teacher is None:
            continue
        teacher_rows = {row.tobytes() for row in _row_bytes(teacher.to(dtype))}
        for block in blocks:
            rows = block.down.T if name == "down" else getattr(block, name)
            same = [i for i, row in enumerate(_row_bytes(rows)) if row.any() and row.tobytes() in teacher_rows]
            for i in same:
                row = rows[i].float()
                noise = torch.randn(row.shape, generator=generator).to(row.device)
                rows[i] = (row + 0.01 * (row.square().mean().sqrt() + 1e-6) * noise).to(dtype)
            changed += len(same)
    return changed


def _row_bytes(matrix: torch.Tensor) -> np.ndarray:
    """The bytes of each row of a matrix, `[rows, bytes]`."""
    return matrix.detach().cpu().contiguous().view(torch.uint8).numpy()
