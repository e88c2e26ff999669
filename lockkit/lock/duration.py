"""The time of a lock: predicted from its operations and from what this machine computes per second.

1. Time matrix products of the model's sizes for a fraction of a second each (`measure_speed`): of a whole MLP, and of a
   block at each depth, which is slower because it is narrow.
2. Count the operations of each step of a lock at default settings (`predicted_seconds`), and divide.

A lock does not compute products all the time, nor one product again and again. So it reaches a share of that speed
(`SHARE_OF_SPEED`). What is not a matrix product is counted in operations that take as long. These constants were fitted
to two locks on 2 CPU cores: `demo` (32 s) and Gemma 3 270M (1,732 s, with other work beside it).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from lockkit.dlr.cost import mlp_parameters
from lockkit.dlr.shape import MLPShape, block_ranks
from lockkit.lock.config import LockConfig
from lockkit.lock.sizes import CAPTURED_TOKENS, FIT_TOKENS, MEASURED_TOKENS

SECONDS_PER_PRODUCT = 0.04  # to measure one size; a first run, for warming up, is added
FEWEST_PRODUCTS = 4
MOST_COLUMNS = 2048  # of a measured matrix
OTHER_TEXT_TOKENS = 4096  # of each other text on which a lock is measured
# The original is run three times over the evaluation text, the locked model twice.
PASSES_OVER_EVALUATION = 5
# Operations that take as long as the rest of a step's work: log probabilities in float64 and their sums, per logit; and
# activations, the optimiser and the loss, as a share of the products of training.
OPERATIONS_PER_LOGIT = 3_000
OTHER_WORK_IN_TRAINING = 0.15
SHARE_OF_SPEED = 0.6
HALF_SPEED_UP = (
    4.4  # of bfloat16 over float32, where the processor has products in it: 940 and 215 billion operations/s
)
SHARE_IN_SAMPLING = 0.25  # one token of each row at a time


@dataclass(frozen=True)
class Speed:
    """Operations per second that this machine computes in matrix products; a multiplication with an addition is two.

    Attributes:
        dense: in a whole MLP, float32.
        sampling: in the same, in the dtype in which text is sampled.
        blocks: in one block of a chain, by depth.
    """

    dense: float
    sampling: float
    blocks: dict[int, float]


def measure_speed(shape: MLPShape, depths: list[int], batch_tokens: int, half: bool) -> Speed:
    """Time matrix products of this shape; it takes about 0.1 s for each depth.

    Args:
        shape: of the MLPs.
        depths: of the chains.
        batch_tokens: rows of the products.
        half: text is sampled in bfloat16, whose speed is not measured, but taken from that of float32.
    """
    columns = min(MOST_COLUMNS, shape.intermediate_size)
    dense = _rate(batch_tokens, shape.hidden_size, columns)
    return Speed(
        dense=dense,
        sampling=dense * (HALF_SPEED_UP if half else 1),
        blocks={
            depth: _rate(batch_tokens, shape.hidden_size, max(block_ranks(shape.intermediate_size, depth)))
            for depth in depths
        },
    )


def _rate(rows: int, inner: int, columns: int) -> float:
    """Operations per second of `[rows, inner] x [inner, columns]` and of the product back to `inner` columns, in float32.

    NumPy computes it, because PyTorch alone takes seconds to import.
    """
    x, w = np.zeros((rows, inner), np.float32), np.zeros((inner, columns), np.float32)
    (x @ w) @ w.T
    times: list[float] = []
    ends = time.perf_counter() + SECONDS_PER_PRODUCT
    while time.perf_counter() < ends or len(times) < FEWEST_PRODUCTS:
        wall, processor = time.perf_counter(), time.process_time()
        (x @ w) @ w.T
        # Other programs make single products slow, in wall time above all.
        times += [time.perf_counter() - wall, time.process_time() - processor]
    return 4 * rows * inner * columns / max(min(times), 1e-6)


def predicted_seconds(
    *,
    speed: Speed,
    shape: MLPShape,
    layers: int,
    layer_parameters: int,
    vocab_size: int,
    samples: bool,
    config: LockConfig,
) -> float:
    """The predicted wall time of a lock on this machine's CPU, without phase 2, in seconds.

    Args:
        speed: of this machine; has `config.depth`.
        shape: of the MLPs.
        layers: number of decoder layers.
        layer_parameters: parameters of one decoder layer.
        vocab_size: number of logits per token.
        samples: the model writes the text (`--data self`).
        config: the recipe.
    """
    depth, hidden = config.depth, shape.hidden_size
    text = config.tokens + 2 * config.validation_tokens
    head = 2 * hidden * vocab_size  # operations of a token
    layer, mlp = 2 * layer_parameters, 2 * mlp_parameters(shape)

    sampling = text * (layers * layer + head) if samples else 0
    capture = layers * layer * (config.tokens + config.validation_tokens)
    # Teacher forward; chain forward and twice as much backward.
    training = config.tokens * mlp * (1 + OTHER_WORK_IN_TRAINING)
    in_blocks = 3 * training
    fits = _fit(shape, depth, min(FIT_TOKENS, config.tokens)) + _fit(shape, depth, min(CAPTURED_TOKENS, config.tokens))
    pilot = layers**2 / 2 * MEASURED_TOKENS * layer + layers * layer * CAPTURED_TOKENS
    evaluation = PASSES_OVER_EVALUATION * config.validation_tokens + 2 * OTHER_TEXT_TOKENS * len(config.other_texts)
    measuring = evaluation * layers * layer
    logits = (evaluation + (layers + 1) * MEASURED_TOKENS) * (head + OPERATIONS_PER_LOGIT * vocab_size)
    dense = capture + layers * (training + fits) + pilot + measuring + logits
    distillation = dense / speed.dense + layers * in_blocks / speed.blocks[depth]
    return sampling / speed.sampling / SHARE_IN_SAMPLING + distillation / SHARE_OF_SPEED


def _fit(shape: MLPShape, depth: int, tokens: int) -> float:
    """Operations of the least-squares fit of one chain (least_squares.py)."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    products = tokens * (2 * mlp_parameters(shape) + 4 * hidden * width + 4 * hidden**2)
    # For each block, a linear system and products of moments, in float64, which takes twice as long.
    return products + depth * 2 * (8 / 3 * hidden**3 + 4 * hidden**2 * width / depth)
