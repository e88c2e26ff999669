"""Building unlocked models: ordinary models, and locked models with shorter chains, from solved weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet, block_ranks
from lockkit.dlr.view import load_side_by_side
from lockkit.models.families import Family, decoder_layers, mlp_weights
from lockkit.models.locked import base_config, chain_config, locked_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def ordinary_model(locked: PreTrainedModel, family: Family, layers: list[MLPWeights] | None = None) -> PreTrainedModel:
    """A model of the original architecture with the MLPs `layers`. All other weights are the lock's.

    Args:
        layers: the MLP of each decoder layer; None for MLPs of random weights.
    """
    import transformers

    configuration = base_config(locked.config, family)
    model = getattr(transformers, family.model_class)(configuration).to(locked.device, torch.float32)
    rest = {key: value for key, value in locked.state_dict().items() if ".mlp." not in key}
    model.load_state_dict(rest, strict=False)
    model.tie_weights()
    for layer, solved in zip(decoder_layers(model), layers or [], strict=False):
        mlp_weights(layer.mlp, family).copy_(solved)
    return model.eval()


@torch.no_grad()
def chain_model(
    locked: PreTrainedModel,
    family: Family,
    stages: int,
    layers: list[list[MLPWeights]],
    intermediate_size: int | None = None,
) -> PreTrainedModel:
    """A locked model with chains of another depth. All weights outside the chains are the lock's.

    Args:
        stages: blocks in each chain.
        layers: `layers[i][k]` holds the weights of block k in decoder layer i.
        intermediate_size: units of a whole chain, if their number is not the lock's.
    """
    configuration = locked_classes(family)[0].from_dict(locked.config.to_dict())
    gains = tuple(layer.mlp.gain for layer in decoder_layers(locked))
    chains = chain_config(locked.config)
    assert chains is not None, "a locked model has chains"
    configuration.dlr = replace(chains, depth=stages, gains=gains).to_dict()
    configuration.intermediate_size = intermediate_size or configuration.intermediate_size
    model = locked_classes(family)[1](configuration).to(locked.device, torch.float32)
    rest = {key: value for key, value in locked.state_dict().items() if ".mlp." not in key}
    model.load_state_dict(rest, strict=False)
    model.tie_weights()
    for layer, blocks in zip(decoder_layers(model), layers, strict=True):
        load_side_by_side(layer.mlp, MLPWeights.side_by_side(blocks))
    return model.eval()


def stage_bounds(chain: DLRNet, stages: int) -> list[tuple[int, int]] | None:
    """The blocks `[first, last)` of each stage, so that the stages have the ranks of a chain of that many blocks.

    None if the ranks of the blocks do not add up to those.
    """
    ranks = chain.ranks
    bounds, first = [], 0
    for wanted in block_ranks(sum(ranks), stages):
        last, units = first, 0
        while last < len(ranks) and units < wanted:
            units, last = units + ranks[last], last + 1
        if units != wanted:
            return None
        bounds.append((first, last))
        first = last
    return bounds
