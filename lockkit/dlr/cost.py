"""What a DLR-Net costs beside the MLP it replaces: parameters, saved activations, time.

Counts are per module and per token; widths as in the paper: hidden size d, MLP width h,
depth L, with the ranks adding up to h (arXiv 2605.10777).
"""

from __future__ import annotations

from lockkit.dlr.mlp import MLPShape
from lockkit.dlr.net import block_ranks


def mlp_parameters(shape: MLPShape) -> int:
    """Parameters of the MLP, and exactly as many of a DLR-Net of any depth."""
    matrices = 3 if shape.gated else 2
    count = matrices * shape.hidden_size * shape.intermediate_size
    if shape.bias:
        count += (matrices - 1) * shape.intermediate_size
    return count + (shape.hidden_size if shape.output_bias else 0)


def dlr_parameters(shape: MLPShape, depth: int) -> int:
    """Parameters of the DLR-Net, summed over its blocks."""
    matrices = 3 if shape.gated else 2
    blocks = sum(
        matrices * shape.hidden_size * rank + ((matrices - 1) * rank if shape.bias else 0)
        for rank in block_ranks(shape.intermediate_size, depth)
    )
    return blocks + (shape.hidden_size if shape.output_bias else 0)


def mlp_saved_values(shape: MLPShape) -> int:
    """Values that plain autograd keeps for the MLP's backward pass, per token.

    The input, and for a gated MLP gate, activated gate, up and their product (d + 4h);
    for two layers the units before and after the activation (d + 2h).
    """
    return shape.hidden_size + (4 if shape.gated else 2) * shape.intermediate_size


def dlr_saved_values(shape: MLPShape, depth: int) -> int:
    """Values that plain autograd keeps for the DLR-Net's backward pass, per token.

    Every block keeps its own input `t_l`: L d in place of d, the units' as in the MLP.
    """
    return depth * shape.hidden_size + (4 if shape.gated else 2) * shape.intermediate_size


# A model of the chain's overhead, not a measurement of the machine at hand: seconds one block
# adds to a token's step on onnxruntime's CPU provider (measured, README), and a memory
# bandwidth that turns weight bytes into seconds.
SECONDS_PER_BLOCK = 9e-6
ASSUMED_BYTES_PER_SECOND = 20e9


def expected_decode_slowdown(layer_parameters: int, depth: int, bytes_per_weight: int = 4) -> float:
    """Rough factor by which decoding one token slows down on a CPU.

    `layer_parameters` counts one whole decoder layer; the rest of the model is left out.
    """
    original = layer_parameters * bytes_per_weight / ASSUMED_BYTES_PER_SECOND + 5 * SECONDS_PER_BLOCK
    return (original + depth * SECONDS_PER_BLOCK) / original
