"""The cost of locking a model at each depth, computed from its sizes.

No weights are needed. If there are any, only the heads of their files are read, so a plan takes about a second for a model
of any size: neither PyTorch nor transformers is imported where the files are plain (lockkit/models/sizes.py). One figure
is measured: what this machine computes per second, for the expected time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockkit.dlr.cost import (
    dlr_parameters,
    dlr_saved_values,
    expected_decode_slowdown,
    mlp_parameters,
    mlp_saved_values,
)
from lockkit.dlr.shape import MLPShape, block_ranks
from lockkit.environment import cpu_has_fast_bfloat16
from lockkit.files import schema_record
from lockkit.lock.config import LockConfig, effective_source
from lockkit.lock.duration import measure_speed, predicted_seconds
from lockkit.lock.memory import cache_values, predict, sampling_bytes
from lockkit.models.families import decoder_layers, mlp_weights, require_unlocked
from lockkit.models.load import load_config, resolve_model
from lockkit.models.sizes import BYTES_OF_DTYPE, ModelSizes, sizes_in_files
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
        lock_seconds: predicted time of `lockkit lock` on this machine's CPU at default settings.
        lock_disk_bytes: predicted space on disk: the locked folder, and the work folder while the lock is made.
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
    lock_seconds: float
    lock_disk_bytes: int


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
        operations_per_second: that this machine's CPU computes in matrix products of the MLPs' size, in float32, measured
            now; a multiplication with an addition is two operations.
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
    operations_per_second: float
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
    sizes = sizes_in_files(folder) or sizes_by_transformers(folder, model)
    shape, layers, layer_parameters = sizes.shape, sizes.layers, sizes.layer_parameters
    parameters, width = sizes.parameters, sizes.shape.intermediate_size
    for depth in depths or []:
        validated(LockConfig, {"depth": depth}).check_depth(width)
    depths = depths or [depth for depth in DEPTHS if depth <= width]
    recipe = LockConfig()
    samples = effective_source(recipe, model) == "self"
    half = samples and sizes.dtype == "bfloat16" and cpu_has_fast_bfloat16()
    sampling = (
        sampling_bytes(parameters, sizes.cache_values, sizes.vocab_size, half, recipe.block_tokens) if samples else 0
    )
    speed = measure_speed(shape, depths, recipe.batch_tokens, half)

    def memory(depth: int, in_memory: bool) -> int:
        phase_2 = recipe.end_to_end_batch_tokens if in_memory else 0
        return predict(
            shape=shape,
            layers=layers,
            layer_parameters=layer_parameters,
            outside_parameters=parameters - layers * layer_parameters,
            vocab_size=sizes.vocab_size,
            tokens=recipe.tokens + recipe.validation_tokens,
            sampling_bytes=sampling,
            rounded=False,
            together=1,
            in_memory=in_memory,
            config=recipe.model_copy(update={"depth": depth, "end_to_end_tokens": phase_2}),
        ).total_bytes

    def row(depth: int) -> PlanRow:
        ranks, saved = block_ranks(width, depth), dlr_saved_values(shape, depth)
        return PlanRow(
            depth=depth,
            rank=max(ranks),
            smallest_rank=min(ranks),
            mlp_parameters=dlr_parameters(shape, depth),
            saved_bytes_per_token=4 * saved * layers,
            saved_bytes_ratio=saved / mlp_saved_values(shape),
            expected_decode_slowdown=expected_decode_slowdown(layer_parameters, depth),
            lock_memory_bytes=memory(depth, in_memory=False),
            lock_memory_all_layers_bytes=memory(depth, in_memory=True),
            lock_seconds=predicted_seconds(
                speed=speed,
                shape=shape,
                layers=layers,
                layer_parameters=layer_parameters,
                vocab_size=sizes.vocab_size,
                samples=samples,
                config=recipe.model_copy(update={"depth": depth}),
            ),
            lock_disk_bytes=parameters * BYTES_OF_DTYPE[sizes.dtype] + _work_bytes(shape, layers, recipe),
        )

    return Plan(
        schema_version=SCHEMA,
        model_type=sizes.model_type,
        layers=layers,
        hidden_size=shape.hidden_size,
        intermediate_size=width,
        parameters=parameters,
        original_mlp_parameters=mlp_parameters(shape),
        original_saved_bytes_per_token=4 * mlp_saved_values(shape) * layers,
        operations_per_second=speed.dense,
        rows=[row(depth) for depth in depths],
    )


def sizes_by_transformers(folder: Path, model: str) -> ModelSizes:
    """The sizes of the model in a folder, from transformers' own class of it, on the `meta` device.

    Args:
        folder: the model.
        model: as the user gave it, for messages.

    Raises:
        UsageError, UnsupportedModelError: see `plan_model`.
    """
    from lockkit.models.checkpoint import Checkpoint, stored_dtype
    from lockkit.models.layered import empty_model

    config = load_config(folder)
    family = require_unlocked(config, model)
    network = empty_model(config, family)
    has_weights = any(folder.glob("*.safetensors"))
    if has_weights:
        Checkpoint(folder, network)  # raises an error if the weights are not this model's
    dtype = str(stored_dtype(folder, config)) if has_weights else "bfloat16"  # as most models are published
    return ModelSizes(
        model_type=family.model_type,
        shape=mlp_weights(decoder_layers(network)[0].mlp, family).shape,
        layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        parameters=sum(p.numel() for p in network.parameters()),
        layer_parameters=sum(p.numel() for p in decoder_layers(network)[0].parameters()),
        cache_values=cache_values(config),
        dtype=dtype.removeprefix("torch."),
    )


def _work_bytes(shape: MLPShape, layers: int, recipe: LockConfig) -> int:
    """Bytes of the work folder at its fullest: the finished chains, and activations beyond the cache, in float32."""
    activations = 2 * 4 * (recipe.tokens + recipe.validation_tokens) * shape.hidden_size
    return 4 * layers * mlp_parameters(shape) + max(0, activations - int(recipe.cache_gigabytes * 1e9))
