"""Peak memory of a lock: predicted before it starts, and recorded when it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lockkit.dlr.cost import mlp_parameters
from lockkit.dlr.shape import MLPShape, block_ranks
from lockkit.lock.config import LockConfig
from lockkit.lock.sizes import FIT_TOKENS, MEASURED_TOKENS, ROWS_AT_ONCE, ROWS_IN_A_BATCH
from lockkit.measure.sizes import CHUNK_LOGITS, PIECE_LOGITS
from lockkit.models.families import mlp_weights
from lockkit.models.sizes import TOKENS_IN_A_BATCH

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from lockkit.devices import PeakMemory
    from lockkit.lock.data import DistillationData
    from lockkit.models.layered import StreamedModel

FLOAT_BYTES = 4
HALF_BYTES = 2
# Memory of a tokenizer per token of the vocabulary: Gemma's 262,144 tokens took 0.22 GB.
TOKENIZER_BYTES_PER_TOKEN = 850
SHARE_TO_USE = 0.6  # of free memory
# In training, a chain is in memory six times: published form, packed, scaled, gradient, and Adam's two moments.
COPIES_OF_A_CHAIN = 6
# The loss of phase 2, per logit of a chunk: logits, log probabilities and temporaries in float32.
BYTES_PER_LOGIT_OF_PHASE_2 = 24
# The meter, per logit of a piece: shifted logits and weights of both models, and one temporary, in float64.
BYTES_PER_LOGIT_OF_A_PIECE = 40
# Memory of a growing cache of keys and values, over its size: each tensor is replaced by a larger one, which does not fit
# where the allocator has kept the memory of earlier ones. Measured on Gemma 3 270M (tools/results/real.md).
CACHE_WITH_GAPS = 1.33
# The tokenizer's caches, scratch memory of matrix products, and memory that the allocator does not return. Measured on
# models of 4 to 16 layers (tools/measure_memory.py).
BUFFER_BYTES = 60_000_000


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted peak memory of a lock by purpose, in bytes, without the interpreter and libraries.

    Sampling text, training steps with their activation cache, and comparing logits follow one after the other, so only
    the largest of the three counts.

    Attributes:
        outside_layers_bytes: the original's weights outside its decoder layers.
        decoder_layers_bytes: the original's decoder layers that are in memory at the same time.
        chains_bytes: the chains in memory, with gradients and optimiser.
        sampling_bytes: the model and its caches while it writes the text (`--data self`).
        step_bytes: activations of one training step, or of the fit before it.
        activation_cache_bytes: hidden states and MLP inputs of phase 1.
        logits_bytes: logits while the locked model is compared with the original, and the weights outside its decoder
            layers if the checkpoint's dtype rounds them.
        buffer_bytes: the tokenizer, caches of libraries and the allocator.
        phase_2_keeps_all_layers: phase 2 has all layers in memory, not one at a time.
    """

    outside_layers_bytes: int
    decoder_layers_bytes: int
    chains_bytes: int
    sampling_bytes: int
    step_bytes: int
    activation_cache_bytes: int
    logits_bytes: int
    buffer_bytes: int
    phase_2_keeps_all_layers: bool

    @property
    def total_bytes(self) -> int:
        """The predicted peak."""
        distilling = self.outside_layers_bytes + self.decoder_layers_bytes + self.chains_bytes
        distilling += max(self.step_bytes + self.activation_cache_bytes, self.logits_bytes)
        return self.buffer_bytes + max(self.sampling_bytes, distilling)

    def line(self) -> str:
        """One line for the user."""
        where = "all layers in memory in phase 2" if self.phase_2_keeps_all_layers else "one layer at a time"
        return f"expected peak memory: {self.total_bytes / 1e9:.2f} GB beyond the libraries' own ({where})"

    def record(self, memory: PeakMemory) -> dict[str, Any]:
        """The entry on memory in `lockkit.json`: the prediction and the measurement, in bytes."""
        return {
            "predicted_bytes": self.total_bytes,
            "prediction": asdict(self),
            "kind": memory.kind,
            "idle_bytes": memory.idle_bytes,
            "peak_bytes": memory.peak_bytes(),
        }


def predicted_memory(
    stream: StreamedModel, config: LockConfig, data: DistillationData, dtype: torch.dtype
) -> MemoryPrediction:
    """The predicted peak memory of locking `stream` with this recipe and data. `dtype` is that of the checkpoint."""
    tokens = min(data.train.numel(), -(-config.tokens // data.train.shape[1]) * data.train.shape[1])
    return predict(
        shape=mlp_weights(stream.layers[0].mlp, stream.family).shape,
        layers=len(stream),
        layer_parameters=sum(p.numel() for p in stream.layers[0].parameters()),
        outside_parameters=sum(p.numel() for n, p in stream.model.named_parameters() if ".layers." not in n),
        vocab_size=stream.config.vocab_size,
        tokens=tokens + data.validation.numel(),
        sampling_bytes=_sampling_bytes(stream, data.train.shape[1]) if data.source == "self" else 0,
        rounded=not stream.checkpoint.exact_in(list(stream.outside()), dtype),
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
    sampling_bytes: int,
    rounded: bool,
    together: int,
    in_memory: bool,
    config: LockConfig,
) -> MemoryPrediction:
    """The predicted peak memory of a lock, from sizes alone.

    Args:
        shape: of the MLPs.
        layers: number of decoder layers.
        layer_parameters: parameters of one decoder layer.
        outside_parameters: parameters outside the decoder layers.
        vocab_size: number of logits per token.
        tokens: tokens whose activations are cached.
        sampling_bytes: see `sampling_bytes`; 0 if the text is not sampled.
        rounded: the locked checkpoint's dtype rounds the weights outside the decoder layers.
        together: layers that phase 1 trains in one batched computation.
        in_memory: phase 2 keeps all layers in memory.
        config: the recipe.
    """
    kept = layers if in_memory and config.end_to_end_tokens else 1
    block = min(config.block_tokens, tokens)
    cache = FLOAT_BYTES * tokens * shape.hidden_size * (1 + together)
    return MemoryPrediction(
        outside_layers_bytes=FLOAT_BYTES * outside_parameters,
        decoder_layers_bytes=FLOAT_BYTES * layer_parameters * max(kept, together),
        chains_bytes=FLOAT_BYTES * mlp_parameters(shape) * COPIES_OF_A_CHAIN * max(kept, together),
        sampling_bytes=sampling_bytes,
        step_bytes=max(
            fit_bytes(shape, config.depth, min(FIT_TOKENS, tokens)),
            together * step_bytes(shape, config.depth, min(config.batch_tokens, tokens)),
            step_bytes(shape, config.depth, min(config.end_to_end_batch_tokens, tokens)),
            # attention and MLP of one layer, while MLP inputs are captured
            FLOAT_BYTES * min(TOKENS_IN_A_BATCH, tokens) * (8 * shape.hidden_size + 3 * shape.intermediate_size),
        ),
        activation_cache_bytes=min(cache, int(config.cache_gigabytes * 1e9)),
        logits_bytes=logits_bytes(vocab_size, block, config.end_to_end_tokens > 0)
        + FLOAT_BYTES * outside_parameters * rounded
        + FLOAT_BYTES * layers * MEASURED_TOKENS * shape.hidden_size,  # the pilot's variants
        buffer_bytes=BUFFER_BYTES + TOKENIZER_BYTES_PER_TOKEN * vocab_size,
        phase_2_keeps_all_layers=kept > 1,
    )


def logits_bytes(vocab_size: int, block: int, phase_2: bool) -> int:
    """The most memory that logits need: those of a chunk in the meter, whatever the vocabulary."""
    logits = ROWS_IN_A_BATCH * block * vocab_size
    chunk = (BYTES_PER_LOGIT_OF_PHASE_2 if phase_2 else 2 * FLOAT_BYTES) * min(CHUNK_LOGITS, logits)
    return chunk + BYTES_PER_LOGIT_OF_A_PIECE * min(PIECE_LOGITS, logits)


def sampling_bytes(parameters: int, cache_values: int, vocab_size: int, half: bool, block: int) -> int:
    """Bytes of a model that samples text: its weights, its cache, and the logits of one step (sampling.py).

    Args:
        parameters: of the model.
        cache_values: numbers in its cache, per token.
        vocab_size: number of logits per token.
        half: it samples in bfloat16, not in float32.
        block: tokens in a row.
    """
    logits = ROWS_AT_ONCE * vocab_size
    values = parameters + int(CACHE_WITH_GAPS * cache_values * ROWS_AT_ONCE * block) + logits
    return (HALF_BYTES if half else FLOAT_BYTES) * values + 2 * FLOAT_BYTES * min(CHUNK_LOGITS, logits)


def cache_values(config: PreTrainedConfig) -> int:
    """Numbers in a model's cache of keys and values, per token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_width


def _sampling_bytes(stream: StreamedModel, block: int) -> int:
    from lockkit.lock.sampling import samples_in_bfloat16
    from lockkit.models.checkpoint import stored_dtype

    parameters = sum(parameter.numel() for parameter in stream.model.parameters())
    half = samples_in_bfloat16(stored_dtype(stream.folder, stream.config), stream.device)
    return sampling_bytes(parameters, cache_values(stream.config), stream.config.vocab_size, half, block)


def fit_bytes(shape: MLPShape, depth: int, tokens: int) -> int:
    """Bytes of the least-squares fit: inputs, block inputs and units of `tokens` tokens, and six matrices in float64."""
    values = 2 * shape.hidden_size + max(block_ranks(shape.intermediate_size, depth))
    return FLOAT_BYTES * tokens * values + 6 * 2 * FLOAT_BYTES * shape.hidden_size**2


def step_bytes(shape: MLPShape, depth: int, batch_tokens: int) -> int:
    """Bytes of the activations in one training step of a packed chain (lockkit/lock/packed.py).

    These are the input of every block; pre-activations, their gradients, activated values, derivatives and products of
    all units; and the hidden values of the teacher.

    Args:
        shape: of the MLP.
        depth: blocks in the chain.
        batch_tokens: tokens in the step.
    """
    padded = depth * max(block_ranks(shape.intermediate_size, depth))
    matrices = 2 if shape.gated else 1  # gate and up, or up alone
    teacher = (matrices + 2) * shape.intermediate_size
    values = depth * shape.hidden_size + (2 * matrices + 4) * padded + 6 * shape.hidden_size + teacher
    return FLOAT_BYTES * batch_tokens * values


def layers_together(stream: StreamedModel, config: LockConfig) -> int:
    """The number of layers that phase 1 trains in one batched computation."""
    if config.layers_together:
        return min(config.layers_together, len(stream))
    if stream.device.type == "cpu":
        return 1  # batching layers is slower on a CPU, as measured with tools/benchmark_lock.py
    from lockkit.devices import available_bytes

    shape = mlp_weights(stream.layers[0].mlp, stream.family).shape
    layer_parameters = sum(p.numel() for p in stream.layers[0].parameters())
    bytes_per_layer = FLOAT_BYTES * (layer_parameters + COPIES_OF_A_CHAIN * mlp_parameters(shape))
    bytes_per_layer += step_bytes(shape, config.depth, config.batch_tokens)
    return max(1, min(len(stream), int(SHARE_TO_USE * available_bytes(stream.device) / bytes_per_layer)))


def keeps_everything(stream: StreamedModel, config: LockConfig) -> bool:
    """Whether phase 2 keeps all layers, chains and optimisers in memory, by the recipe or because they fit."""
    if config.offload != "auto":
        return config.offload == "none"
    from lockkit.devices import available_bytes

    shape = mlp_weights(stream.layers[0].mlp, stream.family).shape
    layer_parameters = sum(p.numel() for p in stream.layers[0].parameters())
    needed_bytes = FLOAT_BYTES * len(stream) * (layer_parameters + COPIES_OF_A_CHAIN * mlp_parameters(shape))
    return needed_bytes <= SHARE_TO_USE * available_bytes(stream.device)
