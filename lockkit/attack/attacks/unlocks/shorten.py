"""Shorter chains without a regression: by merging neighbouring blocks to first order, or by dropping small ones.

*Merging* replaces blocks `l .. l+k-1` by one block of all their units, which reads `t_l`:

1. Block `l+i` reads `t_{l+i} = x + gain * s_{l+i}`. That is `t_l` plus `gain` times the updates of the blocks between.
2. Each of these updates, `U a(t)`, is replaced by its first-order expansion `U (A t + o)`. `A` is the units' mean
   Jacobian over unlabelled activations, which needs two means per unit: for `a = act(g) * v`,
   `A = diag(mean(act'(g) v)) G + diag(mean(act(g))) V`; for `a = act(v)`, `A = diag(mean(act'(v))) V`.
3. So `t_{l+i} = M t_l + c` with `M <- M + gain U A M`, and the block's rows become `V M` (and `G M`). The offsets
   `o` and `c` go into biases. In families without biases they are lost.
4. The columns `U` do not change. Unlike in `stack-solve`, nothing is fitted.

*Pruning* drops the blocks whose updates together have the least energy (sum of squares), and truncates each factor of
the other blocks to a share of the energy of its singular values.

Sources: merging layers by a first-order expansion of the residual stream follows from the method itself;
dropping residual blocks by what they contribute, Veit et al. 2016, arXiv 1605.06431; truncation, Eckart and Young 1936.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Field

from lockkit.attack.attacks.unlocks.closed_form import CHUNK, of_each_chain, unlabelled_rows
from lockkit.attack.base import UnlockAttack, Unlocked
from lockkit.attack.rebuild import chain_model, ordinary_model
from lockkit.dlr.mlp import Activation, MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import Step, block_weights, walk
from lockkit.models.families import decoder_layers
from lockkit.models.locked import chain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.config import AuditConfig
    from lockkit.attack.subjects import Subjects


@dataclass
class _Means:
    """Means over tokens for one block."""

    gate_slope: torch.Tensor | None  # `[rank]`, derivative of the units by their gate pre-activations
    up_slope: torch.Tensor  # `[rank]`, derivative of the units by their up pre-activations
    units: torch.Tensor  # `[rank]`
    inputs: torch.Tensor  # `[hidden]`
    update_energy: torch.Tensor  # scalar, squared norm of the update


def _block_means(step: Step, activation: Activation) -> _Means:
    leading, *up = step.before  # the activation's argument, and in gated blocks the factor of its result
    with torch.enable_grad():
        leaf = leading.detach().requires_grad_()
        after = activation(leaf.view_as(leaf))  # a view: the hooks of PyTorch's FLOP counter refuse a leaf
        (slope,) = torch.autograd.grad(after.sum(), leaf)
    after = after.detach()
    units = after * up[0] if up else after
    return _Means(
        gate_slope=(slope * up[0]).mean(0) if up else None,
        up_slope=(after if up else slope).mean(0),
        units=units.mean(0),
        inputs=step.t.mean(0),
        update_energy=step.update.square().sum(1).mean(),
    )


def _weighted_sum(parts: Sequence[_Means], weights: Sequence[float]) -> _Means:
    def total(values: list[torch.Tensor | None]) -> Any:
        products = [value * weight for value, weight in zip(values, weights, strict=True) if value is not None]
        return sum(products[1:], start=products[0]) if products else None

    return _Means(**{field.name: total([getattr(part, field.name) for part in parts]) for field in fields(_Means)})


@torch.no_grad()
def _means(chain: DLRNet, x: torch.Tensor) -> list[_Means]:
    """Run a chain on its inputs, `[tokens, hidden]`; return the means of each block."""
    device = next(chain.parameters()).device
    chunks = x.split(CHUNK)
    shares = [len(chunk) / len(x) for chunk in chunks]
    means = [[_block_means(step, chain.activation) for step in walk(chain, chunk.to(device))] for chunk in chunks]
    return [_weighted_sum(of_block, shares) for of_block in zip(*means, strict=True)]


@torch.no_grad()
def merge(chain: DLRNet, x: torch.Tensor, bounds: list[tuple[int, int]]) -> list[MLPWeights]:
    """Merge the blocks of each stage into one, see the top of this file.

    Args:
        x: inputs of the chain, `[tokens, hidden]`; only means over them are used.
        bounds: blocks `[first, last)` of each stage.

    Returns:
        The blocks of the shorter chain. The last one carries the output bias, if the chain has one.
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
    """The input of each block as a function of that of the first: `M`, `[hidden, hidden]`, and `c`, `[hidden]`."""
    hidden = blocks[0].up.shape[1]
    m, c = (make(hidden, device=means[0].inputs.device) for make in (torch.eye, torch.zeros))
    found = []
    for block, mean in zip(blocks, means, strict=True):
        found.append((m, c))
        jacobian = mean.up_slope[:, None] * block.up
        if mean.gate_slope is not None and block.gate is not None:
            jacobian = jacobian + mean.gate_slope[:, None] * block.gate
        update = chain.gain * block.down
        if block.up_bias is not None:
            offset = mean.units - jacobian @ mean.inputs
            c = c + update @ (jacobian @ c + offset)
        m = m + update @ (jacobian @ m)
    return found


@torch.no_grad()
def prune(chain: DLRNet, x: torch.Tensor, energy: float) -> tuple[list[MLPWeights], dict[str, Any]]:
    """Drop the smallest blocks of a chain and truncate the others, see the top of this file.

    Args:
        x: inputs of the chain, `[tokens, hidden]`.
        energy: share of the updates' energy, and of each factor's squared singular values, that is kept.

    Returns:
        The blocks that are kept, and notes: `blocks`, their number; `share_of_rank`, the mean rank of their factors
        over the full rank. The last block carries the output bias, if the chain has one.
    """
    energies = torch.stack([mean.update_energy for mean in _means(chain, x)]).cpu()
    order = energies.argsort()
    small = energies[order].cumsum(0) <= (1 - energy) * energies.sum()
    dropped = set(order[:-1][small[:-1]].tolist())  # the largest block is kept, also if all are zero
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
    """The closest matrix of the lowest rank that keeps the share `energy` of the squared singular values; its rank."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    rank = min(int((shares < energy).sum()) + 1, len(values))
    return (u[:, :rank] * values[:rank]) @ vh[:rank], rank


def padded(blocks: list[MLPWeights], count: int, rank: int) -> list[MLPWeights]:
    """Fill every block with zero units up to `rank`, and append zero blocks up to `count`.

    The function of the chain does not change.
    """
    empty: dict[str, Any] = {
        name: None if value is None else torch.zeros_like(value) for name, value in vars(blocks[0]).items()
    }
    zeros = [MLPWeights(**empty) for _ in range(count - len(blocks))]
    for zero in zeros:
        zero.down_bias = None
    found = []
    for block in [*blocks, *zeros]:
        more = rank - len(block.up)
        values: dict[str, Any] = {}
        for name, value in vars(block).items():
            if value is None or name == "down_bias":
                values[name] = value
            else:  # matrices `[rank, hidden]`, `down` `[hidden, rank]`, biases `[rank]`
                before = (0, more) if name == "down" or value.ndim == 1 else (0, 0, 0, more)
                values[name] = torch.nn.functional.pad(value, before)
        found.append(MLPWeights(**values))
    found[-1].down_bias = blocks[-1].down_bias
    return found


class MergeConfig(BaseModel):
    """Settings of `merge-blocks`."""

    neighbours: int | None = Field(
        2, ge=2, description="Number of blocks that become one; None: all blocks of a chain."
    )


class MergeBlocks(UnlockAttack):
    """Fewer blocks. Each replaces several neighbouring blocks to first order."""

    name = "merge-blocks"
    description = (
        "Merge neighbouring blocks to first order, without a regression. All blocks merged are an ordinary MLP."
    )
    reference = "this project (lockkit/attack/attacks/unlocks/shorten.py)"
    Config = MergeConfig
    config: MergeConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[MergeConfig]:
        """Two blocks, four, and all blocks of a chain."""
        return [MergeConfig(neighbours=k) for k in (2, 4, None)]

    def unlock(self, locked: PreTrainedModel, subjects: Subjects) -> Unlocked:
        """Merge the blocks of every chain, with means over the unlabelled tokens."""
        chains = [layer.mlp for layer in decoder_layers(locked)]
        depth = len(chains[0].blocks)
        size = min(depth, self.config.neighbours or depth)
        bounds = [(first, min(first + size, depth)) for first in range(0, depth, size)]
        rows = unlabelled_rows(subjects)
        layers, cost = of_each_chain(locked, rows, subjects, lambda chain, inputs: merge(chain, inputs, bounds))
        if len(bounds) == 1:
            model = ordinary_model(locked, subjects.family, [blocks[0] for blocks in layers])
        else:
            model = _shorter_model(locked, subjects, layers)
        return Unlocked(model, len(bounds), cost)


class PruneConfig(BaseModel):
    """Settings of `prune-svd`."""

    energy: float = Field(
        0.99,
        gt=0,
        lt=1,
        description="Share of energy (sum of squares) that is kept, of updates and of singular values.",
    )


class PruneSVD(UnlockAttack):
    """Fewer blocks of lower rank."""

    name = "prune-svd"
    description = "Drop the blocks with the smallest updates and truncate the factors of the others: a shorter chain."
    reference = "Veit et al. 2016, arXiv 1605.06431; Eckart and Young 1936"
    Config = PruneConfig
    config: PruneConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[PruneConfig]:
        """Two shares of energy."""
        return [PruneConfig(energy=energy) for energy in (0.99, 0.9)]

    def unlock(self, locked: PreTrainedModel, subjects: Subjects) -> Unlocked:
        """Prune every chain, with means over the unlabelled tokens."""
        energy = self.config.energy
        rows = unlabelled_rows(subjects)
        pruned, cost = of_each_chain(locked, rows, subjects, lambda chain, inputs: prune(chain, inputs, energy))
        model = _shorter_model(locked, subjects, [blocks for blocks, _ in pruned])
        chains = chain_config(model.config)
        assert chains is not None, "a shorter chain is a locked model"
        return Unlocked(model, chains.depth, cost, {"layers": [notes for _, notes in pruned]})


def _shorter_model(locked: PreTrainedModel, subjects: Subjects, layers: list[list[MLPWeights]]) -> PreTrainedModel:
    """A locked model with these blocks. Layers with fewer blocks or lower ranks are filled with zeros."""
    count = max(2, *(len(blocks) for blocks in layers))
    rank = max(len(block.up) for blocks in layers for block in blocks)
    layers = [padded(blocks, count, rank) for blocks in layers]
    return chain_model(locked, subjects.family, count, layers, intermediate_size=count * rank)
