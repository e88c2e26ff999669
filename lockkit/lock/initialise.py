"""How a chain starts: from the teacher's own units, or from noise."""

from __future__ import annotations

import torch

from lockkit.dlr.cost import MLPShape
from lockkit.dlr.net import DLRNet, block_ranks
from lockkit.models.families import MLPWeights


def build_chain(shape: MLPShape, depth: int, gain: float, activation) -> DLRNet:
    """An untrained chain with the interface and the parameter count of an MLP of `shape`."""
    return DLRNet(
        hidden_size=shape.hidden_size,
        ranks=block_ranks(shape.intermediate_size, depth),
        activation=activation,
        gated=shape.gated,
        bias=shape.bias,
        output_bias=shape.output_bias,
        gain=gain,
    )


@torch.no_grad()
def start_from_teacher(chain: DLRNet, weights: MLPWeights, seed: int) -> None:
    """Give each block a group of the teacher's hidden units, in a random order fixed by `seed`.

    With coupling 0 the chain then computes exactly what the teacher does.
    """
    fill_blocks(chain, weights, torch.randperm(weights.up.shape[0], generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def fill_blocks(chain: DLRNet, weights: MLPWeights, order: torch.Tensor) -> None:
    """Deal the teacher's units out to the blocks in `order`, `[intermediate]`."""
    groups = order.to(weights.up.device).split([block.up_proj.out_features for block in chain.blocks])
    for block, units in zip(chain.blocks, groups, strict=True):
        block.up_proj.weight.copy_(weights.up[units])
        block.down_proj.weight.copy_(weights.down[:, units])
        if weights.gate is not None:
            block.gate_proj.weight.copy_(weights.gate[units])
        if weights.up_bias is not None:
            block.up_proj.bias.copy_(weights.up_bias[units])
        if weights.gate_bias is not None:
            block.gate_proj.bias.copy_(weights.gate_bias[units])
    if weights.down_bias is not None:
        chain.output_bias.copy_(weights.down_bias)


@torch.no_grad()
def start_from_noise(chain: DLRNet, inputs: torch.Tensor, outputs: torch.Tensor, seed: int) -> None:
    """Draw Gaussian weights that make pre-activations of unit size and outputs of the teacher's size.

    Args:
        inputs, outputs: a sample of the teacher's, `[tokens, hidden]`.
    """
    generator = torch.Generator().manual_seed(seed)
    input_norm = inputs.float().norm(dim=-1).mean().item()
    output_rms = outputs.float().square().mean().sqrt().item()
    units = sum(block.up_proj.out_features for block in chain.blocks)
    for block in chain.blocks:
        for projection in filter(None, (block.gate_proj, block.up_proj)):
            projection.weight.copy_(_normal(projection.weight, generator, 1 / input_norm))
            if projection.bias is not None:
                projection.bias.zero_()
        block.down_proj.weight.copy_(_normal(block.down_proj.weight, generator, output_rms / units**0.5))
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
    dtype = chain.blocks[0].up_proj.weight.dtype
    changed = 0
    pairs = [("up_proj", weights.up), ("gate_proj", weights.gate), ("down_proj", weights.down.T)]
    for name, teacher in pairs:
        if teacher is None:
            continue
        known = {row.tobytes() for row in _as_bits(teacher.to(dtype))}
        for block in chain.blocks:
            matrix = getattr(block, name).weight
            rows = matrix.T if name == "down_proj" else matrix
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
