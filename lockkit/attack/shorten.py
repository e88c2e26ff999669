"""Shorter chains without a regression: neighbouring blocks merged to first order, small ones dropped.

*Merging* blocks `l .. l+k-1` into one of all their units, so that they all read `t_l`:

1. What block `l+i` reads is `t_{l+i} = x + gain * s_{l+i}`: `t_l`, and `gain` times the updates between.
2. Each of these updates, `U a(t)`, is replaced by its first-order expansion `U (A t + o)`. `A` is the units' mean
   Jacobian over unlabelled activations, which needs two means a unit: for `a = act(g) * v`,
   `A = diag(mean(act'(g) v)) G + diag(mean(act(g))) V`; for `a = act(v)`, `A = diag(mean(act'(v))) V`.
3. So `t_{l+i} = M t_l + c` with `M <- M + gain U A M`, and the block's rows become `V M` (and `G M`). The offsets
   `o` and `c` go into biases; families without biases lose them.
4. The columns `U` stay as they are: unlike in `stack-solve`, nothing is solved for.

*Pruning* drops the blocks whose updates together carry the least energy, and cuts the singular values of each
factor of the others down to a share of theirs.

Sources: merging layers by a first-order expansion of the residual stream follows from the method itself;
dropping residual blocks by what they contribute, Veit et al. 2016, arXiv 1605.06431; truncation, Eckart and Young 1936.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lockkit.attack.closed_form import CHUNK
from lockkit.dlr.mlp import Activation, MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import Step, block_weights, walk


@dataclass
class _Means:
    """Over tokens, of one block."""

    gate_slope: torch.Tensor | None  # `[rank]`, of units by gate pre-activations
    up_slope: torch.Tensor  # `[rank]`
    units: torch.Tensor  # `[rank]`
    inputs: torch.Tensor  # `[hidden]`
    update_energy: torch.Tensor  # scalar


def _block_means(step: Step, activation: Activation) -> list[torch.Tensor | None]:
    leading, *up = step.before  # what the activation is applied to, and for gated blocks what multiplies it
    with torch.enable_grad():
        leaf = leading.detach().requires_grad_()
        after = activation(leaf.view_as(leaf))  # a view: the hooks of PyTorch's FLOP counter refuse a leaf
        (slope,) = torch.autograd.grad(after.sum(), leaf)
    after = after.detach()
    units = after * up[0] if up else after
    slopes = [slope * up[0], after] if up else [None, slope]
    means = [value if value is None else value.mean(0) for value in (*slopes, units, step.t)]
    return [*means, step.update.square().sum(1).mean()]


@torch.no_grad()
def _means(chain: DLRNet, x: torch.Tensor) -> list[_Means]:
    """Run a chain on its inputs, `[tokens, hidden]`, and take each block's means."""
    device = next(chain.parameters()).device
    totals: list[list[torch.Tensor | None]] = []
    for part in x.split(CHUNK):
        share = len(part) / len(x)
        for index, step in enumerate(walk(chain, part.to(device))):
            new = [value if value is None else value * share for value in _block_means(step, chain.activation)]
            if index == len(totals):
                totals.append(new)
            else:
                totals[index] = [
                    old if old is None else old + value for old, value in zip(totals[index], new, strict=True)
                ]
    return [_Means(*values) for values in totals]


@torch.no_grad()
def merge(chain: DLRNet, x: torch.Tensor, bounds: list[tuple[int, int]]) -> list[MLPWeights]:
    """Merge the blocks `[first, last)` of each of `bounds` into one.

    Args:
        x: inputs of the chain, `[tokens, hidden]`; only means over them are used.

    Returns:
        The blocks of the shorter chain; the last carries the output bias.
    """
    means = _means(chain, x)
    merged = []
    for first, last in bounds:
        blocks = [block_weights(block) for block in chain.blocks[first:last]]
        for (m, c), block in zip(_seen(chain, blocks, means[first:last]), blocks, strict=True):
            for name in ("up", "gate"):
                rows, bias = getattr(block, name), getattr(block, f"{name}_bias")
                if bias is not None:
                    setattr(block, f"{name}_bias", bias + rows @ c)
                if rows is not None:
                    setattr(block, name, rows @ m)
        merged.append(MLPWeights.side_by_side(blocks))
    merged[-1].down_bias = chain.output_bias
    return merged


def _seen(chain: DLRNet, blocks: list[MLPWeights], means: list[_Means]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each block reads as a function of what the first reads: `M` `[hidden, hidden]` and `c` `[hidden]`."""
    hidden = blocks[0].up.shape[1]
    m, c = (make(hidden, device=means[0].inputs.device) for make in (torch.eye, torch.zeros))
    found = []
    for block, mean in zip(blocks, means, strict=True):
        found.append((m, c))
        jacobian = mean.up_slope[:, None] * block.up
        if mean.gate_slope is not None:
            jacobian = jacobian + mean.gate_slope[:, None] * block.gate
        update = chain.gain * block.down
        if block.up_bias is not None:
            offset = mean.units - jacobian @ mean.inputs
            c = c + update @ (jacobian @ c + offset)
        m = m + update @ (jacobian @ m)
    return found


@torch.no_grad()
def prune(chain: DLRNet, x: torch.Tensor, energy: float) -> tuple[list[MLPWeights], dict]:
    """Drop and truncate; return the blocks that stay, and how much of the chain they are.

    Args:
        x: inputs of the chain, `[tokens, hidden]`.
        energy: share of the updates' energy, and of each factor's squared singular values, that stays.
    """
    energies = torch.stack([mean.update_energy for mean in _means(chain, x)]).cpu()
    order = energies.argsort()
    dropped = set(order[energies[order].cumsum(0) <= (1 - energy) * energies.sum()].tolist())
    kept = [index for index in range(len(chain.blocks)) if index not in dropped]
    blocks, shares = [], []
    for index in kept:
        block = block_weights(chain.blocks[index])
        for name in ("up", "gate", "down"):
            factor = getattr(block, name)
            if factor is not None:
                truncated, rank = _truncated(factor, energy)
                setattr(block, name, truncated)
                shares.append(rank / min(factor.shape))
        blocks.append(block)
    blocks[-1].down_bias = chain.output_bias
    return blocks, {"blocks": len(kept), "share_of_rank": sum(shares) / len(shares)}


def _truncated(matrix: torch.Tensor, energy: float) -> tuple[torch.Tensor, int]:
    """The closest matrix of the least rank that has `energy` of the squared singular values."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    rank = min(int((shares < energy).sum()) + 1, len(values))
    return (u[:, :rank] * values[:rank]) @ vh[:rank], rank


def padded(blocks: list[MLPWeights], count: int, rank: int) -> list[MLPWeights]:
    """The blocks with zero units up to `rank` each, and zero blocks up to `count`; the function is the same."""
    empty = {name: None if value is None else torch.zeros_like(value) for name, value in vars(blocks[0]).items()}
    zeros = [MLPWeights(**empty) for _ in range(count - len(blocks))]
    for zero in zeros:
        zero.down_bias = None
    found = []
    for block in [*blocks, *zeros]:
        more = rank - len(block.up)
        values = {}
        for name, value in vars(block).items():
            if value is None or name == "down_bias":
                values[name] = value
            else:  # matrices `[rank, hidden]`, `down` `[hidden, rank]`, biases `[rank]`
                before = (0, more) if name == "down" or value.ndim == 1 else (0, 0, 0, more)
                values[name] = torch.nn.functional.pad(value, before)
        found.append(MLPWeights(**values))
    found[-1].down_bias = blocks[-1].down_bias
    return found
