"""Memory of a lock: predicted before it starts, measured when it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lockkit.devices import PeakMemory, available_bytes
from lockkit.dlr.cost import MLPShape, mlp_parameters
from lockkit.dlr.net import block_ranks
from lockkit.lock.config import LockConfig
from lockkit.lock.data import DistillationData
from lockkit.lock.meter import ROWS_IN_A_BATCH
from lockkit.measure.totals import CHUNK_LOGITS
from lockkit.models.capture import TOKENS_IN_A_BATCH
from lockkit.models.families import mlp_weights
from lockkit.models.layered import StreamedModel
from lockkit.models.save import SHARD_BYTES

FLOAT_BYTES = 4
SHARE_TO_USE = 0.6  # of the memory that is free
# In training, a chain is there as it is published, packed, scaled, as gradient and as Adam's two moments.
COPIES_OF_A_CHAIN = 6
# Phase 2: logits of teacher and student, logarithms, the loss and its gradient.
COPIES_OF_LOGITS = 10
# The meter, of one chunk: logits of both models in float32, their logarithms and three temporaries in float64.
METER_BYTES_PER_LOGIT = 48
# Measured on models of 4 to 16 layers (tools/measure_memory.py): the tokenizer's caches, scratch memory of matrix
# products, and what the allocator keeps between uses.
BUFFER_BYTES = 60_000_000


@dataclass(frozen=True)
class MemoryPrediction:
    """Peak memory of a lock beyond the interpreter and libraries, in bytes, by what takes it.

    Phase 1's steps, comparing logits and writing follow each other: the largest of them counts.
    """

    outside_layers_bytes: int
    decoder_layers_bytes: int
    chains_bytes: int
    step_bytes: int
    activation_cache_bytes: int
    logits_bytes: int
    writing_bytes: int
    buffer_bytes: int
    phase_2_keeps_all_layers: bool

    @property
    def total_bytes(self) -> int:
        held = self.outside_layers_bytes + self.decoder_layers_bytes + self.chains_bytes + self.buffer_bytes
        return held + max(self.step_bytes + self.activation_cache_bytes, self.logits_bytes, self.writing_bytes)

    def line(self) -> str:
        where = "all layers in memory in phase 2" if self.phase_2_keeps_all_layers else "one layer at a time"
        return f"expected peak memory: {self.total_bytes / 1e9:.2f} GB beyond the libraries' own ({where})"

    def record(self, memory: PeakMemory) -> dict:
        """What `lockkit.json` says of memory: the prediction and the measurement."""
        return {
            "predicted_bytes": self.total_bytes,
            "prediction": asdict(self),
            "kind": memory.kind,
            "idle_bytes": memory.idle_bytes,
            "peak_bytes": memory.peak_bytes(),
        }


def predicted_memory(stream: StreamedModel, config: LockConfig, data: DistillationData) -> MemoryPrediction:
    """Predict the peak memory of a lock of `stream` with `data`."""
    tokens = min(data.train.numel(), -(-config.tokens // data.train.shape[1]) * data.train.shape[1])
    return predict(
        shape=mlp_weights(stream.layers[0].mlp, stream.family).shape,
        layers=len(stream),
        layer_parameters=sum(p.numel() for p in stream.layers[0].parameters()),
        outside_parameters=sum(p.numel() for n, p in stream.model.named_parameters() if ".layers." not in n),
        vocab_size=stream.config.vocab_size,
        tokens=tokens + data.validation.numel(),
        together=layers_together(stream, config),
        in_memory=keeps_everything(stream, config),
        config=config,
    )


def predict(
    *,
    shape: MLPShape,
    layers: int,
    layer_parameters: int,
    outside_parameters: int,
    vocab_size: int,
    tokens: int,
    together: int,
    in_memory: bool,
    config: LockConfig,
) -> MemoryPrediction:
    """Predict from sizes alone; `tokens` counts those whose activations are kept."""
    kept = layers if in_memory and config.end_to_end_tokens else 1
    block = min(config.block_tokens, tokens)
    cache = FLOAT_BYTES * tokens * shape.hidden_size * (1 + together)
    return MemoryPrediction(
        outside_layers_bytes=FLOAT_BYTES * outside_parameters,
        decoder_layers_bytes=FLOAT_BYTES * layer_parameters * max(kept, together),
        chains_bytes=FLOAT_BYTES * mlp_parameters(shape) * COPIES_OF_A_CHAIN * max(kept, together),
        step_bytes=max(
            together * step_bytes(shape, config.depth, min(config.batch_tokens, tokens)),
            step_bytes(shape, config.depth, min(config.end_to_end_batch_tokens, tokens)),
            # attention and MLP of one layer in a capture's forward pass
            FLOAT_BYTES * min(TOKENS_IN_A_BATCH, tokens) * (8 * shape.hidden_size + 3 * shape.intermediate_size),
        ),
        activation_cache_bytes=min(cache, int(config.cache_gigabytes * 1e9)),
        logits_bytes=logits_bytes(vocab_size, block, FLOAT_BYTES * outside_parameters, config),
        writing_bytes=2 * min(SHARD_BYTES, FLOAT_BYTES * layer_parameters * layers),
        buffer_bytes=BUFFER_BYTES,
        phase_2_keeps_all_layers=kept > 1,
    )


def logits_bytes(vocab_size: int, block: int, outside_bytes: int, config: LockConfig) -> int:
    """What logits take at most: all of a batch in phase 2's loss, or a chunk in the meter.

    The last measurement is of the model as written, whose embeddings and head are there beside the original's.
    """
    measured = METER_BYTES_PER_LOGIT * min(CHUNK_LOGITS, ROWS_IN_A_BATCH * block * vocab_size) + outside_bytes
    if not config.end_to_end_tokens:
        return measured
    return max(measured, FLOAT_BYTES * COPIES_OF_LOGITS * config.end_to_end_batch_tokens * vocab_size)


def step_bytes(shape: MLPShape, depth: int, batch_tokens: int) -> int:
    """What one training step of a packed chain holds (lockkit/lock/packed.py), in bytes.

    Every block's input, and for its units: pre-activations and their gradient, activated, slope, product;
    the teacher's own hidden values.
    """
    padded = depth * max(block_ranks(shape.intermediate_size, depth))
    read = 2 if shape.gated else 1
    teacher = (read + 2) * shape.intermediate_size
    values = depth * shape.hidden_size + (2 * read + 4) * padded + 6 * shape.hidden_size + teacher
    return FLOAT_BYTES * batch_tokens * values


def layers_together(stream: StreamedModel, config: LockConfig) -> int:
    """Layers that phase 1 trains in one batched computation."""
    if config.layers_together:
        return min(config.layers_together, len(stream))
    if stream.device.type == "cpu":
        return 1  # measured: batching layers is slower there (tools/benchmark_lock.py)
    shape = mlp_weights(stream.layers[0].mlp, stream.family).shape
    layer = sum(p.numel() for p in stream.layers[0].parameters())
    each = FLOAT_BYTES * (layer + COPIES_OF_A_CHAIN * mlp_parameters(shape))
    each += step_bytes(shape, config.depth, config.batch_tokens)
    return max(1, min(len(stream), int(SHARE_TO_USE * available_bytes(stream.device) / each)))


def keeps_everything(stream: StreamedModel, config: LockConfig) -> bool:
    """Whether phase 2 keeps all layers, chains and optimisers in memory."""
    if config.offload != "auto":
        return config.offload == "none"
    shape = mlp_weights(stream.layers[0].mlp, stream.family).shape
    layer = sum(p.numel() for p in stream.layers[0].parameters())
    needed = FLOAT_BYTES * len(stream) * (layer + COPIES_OF_A_CHAIN * mlp_parameters(shape))
    return needed <= SHARE_TO_USE * available_bytes(stream.device)
