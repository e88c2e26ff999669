"""How a chain starts: from the teacher's own units, or from noise."""

from __future__ import annotations

import torch

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import block_weights, load_side_by_side


def start_from_teacher(chain: DLRNet, weights: MLPWeights, seed: int) -> None:
    """Give each block a group of the teacher's hidden units, in a random order fixed by `seed`.

    At gain 0 the chain then computes exactly what the teacher does.
    """
    order = torch.randperm(weights.up.shape[0], generator=torch.Generator().manual_seed(seed))
    load_side_by_side(chain, weights.select(order))


@torch.no_grad()
def start_from_noise(chain: DLRNet, inputs: torch.Tensor, outputs: torch.Tensor, seed: int) -> None:
    """Draw Gaussian weights that make pre-activations of unit size and outputs of the teacher's size.

    Args:
        inputs, outputs: a sample of the teacher's, `[tokens, hidden]`.
    """
    generator = torch.Generator().manual_seed(seed)
    input_norm = inputs.float().norm(dim=-1).mean().item()
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


def _normal(like: torch.Tensor, generator: torch.Generator, std: float) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device) * std


@torch.no_grad()
def scrub_teacher_rows(chain: DLRNet, weights: MLPWeights, seed: int) -> int:
    """Change every unit's row or column that is still bit for bit the teacher's; return how many.

    Training moves nearly all of them; what no gradient reaches (units that never fire) it leaves
    alone, and rounding to a short dtype can undo a small step. Such rows get noise of 1 % of
    their rms. Compared in the dtype of `chain`, which must be the one that is saved.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [block_weights(block) for block in chain.blocks]
    dtype = blocks[0].up.dtype
    changed = 0
    for name, teacher in (("up", weights.up), ("gate", weights.gate), ("down", weights.down.T)):
        if teacher is None:
            continue
        known = {row.tobytes() for row in _as_bits(teacher.to(dtype))}
        for block in blocks:
            rows = block.down.T if name == "down" else getattr(block, name)
            same = [i for i, row in enumerate(_as_bits(rows)) if row.tobytes() in known]
            for i in same:
                row = rows[i].float()
                noise = torch.randn(row.shape, generator=generator).to(row.device)
                rows[i] = (row + 0.01 * (row.square().mean().sqrt() + 1e-6) * noise).to(dtype)
            changed += len(same)
    return changed


def _as_bits(matrix: torch.Tensor):
    """A matrix's rows as bytes that compare equal only if the weights do, bit for bit."""
    return matrix.detach().cpu().contiguous().view(torch.uint8).numpy()
