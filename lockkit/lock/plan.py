"""The cost of locking a model at each depth, computed from its configuration.

No weights are needed. If there are any, only the heads of their files are read, so a plan takes no time for a model of
any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lockkit.dlr.cost import (
    dlr_parameters,
    dlr_saved_values,
    expected_decode_slowdown,
    mlp_parameters,
    mlp_saved_values,
)
from lockkit.dlr.net import block_ranks
from lockkit.files import schema_record
from lockkit.lock.config import LockConfig
from lockkit.models.families import decoder_layers, mlp_weights, require_unlocked
from lockkit.models.load import load_config, resolve_model
from lockkit.settings import validated

SCHEMA = "lockkit-plan/1"
DEPTHS = (8, 16, 32, 64, 96, 128)


@dataclass(frozen=True)
class PlanRow:
    """The cost of one depth.

    Attributes:
        depth: blocks per chain.
        rank, smallest_rank: units of the largest and of the smallest block.
        mlp_parameters: parameters of one chain.
        saved_bytes_per_token: activations that plain autograd saves for all chains, in float32.
        saved_bytes_ratio: the same, over that of the original's MLPs.
        expected_decode_slowdown: estimated factor for decoding one token on a CPU.
        lock_memory_bytes: predicted peak memory of `lockkit lock` at default settings, without the interpreter and
            libraries.
        lock_memory_all_layers_bytes: the same with phase 2, with all layers in memory.
    """

    depth: int
    rank: int
    smallest_rank: int
    mlp_parameters: int
    saved_bytes_per_token: int
    saved_bytes_ratio: float
    expected_decode_slowdown: float
    lock_memory_bytes: int
    lock_memory_all_layers_bytes: int


@dataclass(frozen=True)
class Plan:
    """The sizes of a model, and one row per depth.

    Attributes:
        schema_version: name and version of this format; `schema` in JSON.
        model_type: the model's family.
        layers: number of decoder layers.
        hidden_size, intermediate_size: of the MLPs.
        parameters: of the whole model.
        original_mlp_parameters: of one MLP.
        original_saved_bytes_per_token: activations that plain autograd saves for all MLPs, in float32.
        rows: one per depth.
    """

    schema_version: str
    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    parameters: int
    original_mlp_parameters: int
    original_saved_bytes_per_token: int
    rows: list[PlanRow]

    def record(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return schema_record(self)


def plan_model(model: str, depths: list[int] | None = None) -> Plan:
    """Tabulate the costs of locking `model` at each of `depths`.

    Raises:
        UsageError: there is no such model, its weights are not those of its configuration, or a lock cannot have one
            of the depths.
        UnsupportedModelError: the model cannot be locked.
    """
    folder = resolve_model(model)
    config = load_config(folder)
    family = require_unlocked(config, model)
    from lockkit.lock.data import effective_source
    from lockkit.lock.memory import predict, sampling_bytes
    from lockkit.models.checkpoint import Checkpoint, stored_dtype
    from lockkit.models.layered import empty_model

    network = empty_model(config, family)
    has_weights = any(folder.glob("*.safetensors"))
    if has_weights:
        Checkpoint(folder, network)  # raises an error if the weights are not this model's
    shape = mlp_weights(decoder_layers(network)[0].mlp, family).shape
    width, layers = shape.intermediate_size, config.num_hidden_layers
    parameters = sum(p.numel() for p in network.parameters())
    layer_parameters = sum(p.numel() for p in decoder_layers(network)[0].parameters())
    for depth in depths or []:
        validated(LockConfig, {"depth": depth}).check_depth(width)
    rows = []
    recipe = LockConfig()
    phase_2_tokens = recipe.end_to_end_batch_tokens
    sampling = 0
    if effective_source(recipe, model) == "self":
        stored = stored_dtype(folder, config) if has_weights else torch.bfloat16  # as most models are published
        sampling = sampling_bytes(config, network, stored, torch.device("cpu"), recipe.block_tokens)

    def memory(depth: int, in_memory: bool) -> int:
        return predict(
            shape=shape,
            layers=layers,
            layer_parameters=layer_parameters,
            outside_parameters=parameters - layers * layer_parameters,
            vocab_size=config.vocab_size,
            tokens=recipe.tokens + recipe.validation_tokens,
            sampling_bytes=sampling,
            together=1,
            in_memory=in_memory,
            config=recipe.model_copy(update={"depth": depth, "end_to_end_tokens": phase_2_tokens if in_memory else 0}),
        ).total_bytes

    for depth in depths or [depth for depth in DEPTHS if depth <= width]:
        ranks = block_ranks(width, depth)
        saved = dlr_saved_values(shape, depth)
        rows.append(
            PlanRow(
                depth=depth,
                rank=max(ranks),
                smallest_rank=min(ranks),
                mlp_parameters=dlr_parameters(shape, depth),
                saved_bytes_per_token=4 * saved * layers,
                saved_bytes_ratio=saved / mlp_saved_values(shape),
                expected_decode_slowdown=expected_decode_slowdown(layer_parameters, depth),
                lock_memory_bytes=memory(depth, in_memory=False),
                lock_memory_all_layers_bytes=memory(depth, in_memory=True),
            )
        )
    return Plan(
        schema_version=SCHEMA,
        model_type=family.model_type,
        layers=layers,
        hidden_size=shape.hidden_size,
        intermediate_size=width,
        parameters=parameters,
        original_mlp_parameters=mlp_parameters(shape),
        original_saved_bytes_per_token=4 * mlp_saved_values(shape) * layers,
        rows=rows,
    )
