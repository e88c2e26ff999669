"""Unlocks that shorten the chains: by merging blocks to first order, or by dropping small blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from lockkit.attack.attacks.closed_form import of_each_chain, unlabelled_rows
from lockkit.attack.base import UnlockAttack, Unlocked
from lockkit.attack.rebuild import chain_model, ordinary_model
from lockkit.attack.shorten import merge, padded, prune
from lockkit.dlr.mlp import MLPWeights
from lockkit.models.families import decoder_layers
from lockkit.models.locked import chain_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.bench import Bench
    from lockkit.attack.config import AuditConfig


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
    reference = "this project (lockkit/attack/shorten.py)"
    Config = MergeConfig
    config: MergeConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[MergeConfig]:
        """Two blocks, four, and all blocks of a chain."""
        return [MergeConfig(neighbours=k) for k in (2, 4, None)]

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Merge the blocks of every chain, with means over the unlabelled tokens."""
        chains = [layer.mlp for layer in decoder_layers(locked)]
        depth = len(chains[0].blocks)
        size = min(depth, self.config.neighbours or depth)
        bounds = [(first, min(first + size, depth)) for first in range(0, depth, size)]
        rows = unlabelled_rows(bench)
        layers, cost = of_each_chain(locked, rows, bench, lambda chain, inputs: merge(chain, inputs, bounds))
        if len(bounds) == 1:
            model = ordinary_model(locked, bench.family, [blocks[0] for blocks in layers])
        else:
            model = _shorter_model(locked, bench, layers)
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

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Prune every chain, with means over the unlabelled tokens."""
        energy = self.config.energy
        rows = unlabelled_rows(bench)
        pruned, cost = of_each_chain(locked, rows, bench, lambda chain, inputs: prune(chain, inputs, energy))
        model = _shorter_model(locked, bench, [blocks for blocks, _ in pruned])
        chains = chain_config(model.config)
        assert chains is not None, "a shorter chain is a locked model"
        return Unlocked(model, chains.depth, cost, {"layers": [notes for _, notes in pruned]})


def _shorter_model(locked: PreTrainedModel, bench: Bench, layers: list[list[MLPWeights]]) -> PreTrainedModel:
    """A locked model with these blocks. Layers with fewer blocks or lower ranks are filled with zeros."""
    count = max(2, *(len(blocks) for blocks in layers))
    rank = max(len(block.up) for blocks in layers for block in blocks)
    layers = [padded(blocks, count, rank) for blocks in layers]
    return chain_model(locked, bench.family, count, layers, intermediate_size=count * rank)
