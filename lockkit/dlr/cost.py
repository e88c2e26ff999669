"""Cost of a DLR-Net and of the MLP it replaces: parameters, saved activations, time.

Counts are per module, and per token where a function says so. Notation of the paper (arXiv 2605.10777): hidden size d,
MLP width h, depth L. The ranks add up to h.
"""

from __future__ import annotations

from lockkit.dlr.shape import MLPShape, block_ranks


def mlp_parameters(shape: MLPShape) -> int:
    """Number of parameters of the MLP; a DLR-Net of any depth has the same number."""
    matrices = 3 if shape.gated else 2
    count = matrices * shape.hidden_size * shape.intermediate_size
    if shape.bias:
        count += (matrices - 1) * shape.intermediate_size
    return count + (shape.hidden_size if shape.output_bias else 0)


def dlr_parameters(shape: MLPShape, depth: int) -> int:
    """Number of parameters of a DLR-Net of `depth` blocks, summed over the blocks."""
    matrices = 3 if shape.gated else 2
    blocks = sum(
        matrices * shape.hidden_size * rank + ((matrices - 1) * rank if shape.bias else 0)
        for rank in block_ranks(shape.intermediate_size, depth)
    )
    return blocks + (shape.hidden_size if shape.output_bias else 0)


def mlp_saved_values(shape: MLPShape) -> int:
    """Number of values per token that plain autograd saves for the MLP's backward pass.

    A gated MLP saves its input, gate, activated gate, up and the product (d + 4h). An MLP of two layers saves its input
    and the units before and after the activation (d + 2h).
    """
    return shape.hidden_size + (4 if shape.gated else 2) * shape.intermediate_size


def dlr_saved_values(shape: MLPShape, depth: int) -> int:
    """Number of values per token that plain autograd saves for the DLR-Net's backward pass.

    Every block saves its input `t_l`: L d values instead of d. The units need as many values as in the MLP.
    """
    return depth * shape.hidden_size + (4 if shape.gated else 2) * shape.intermediate_size


# A model of the chain's overhead; it does not measure this machine.
SECONDS_PER_BLOCK = 9e-6  # that one block adds to decoding a token on onnxruntime's CPU provider, measured
ASSUMED_BYTES_PER_SECOND = 20e9  # memory bandwidth, to turn bytes of weights into seconds


def expected_decode_slowdown(layer_parameters: int, depth: int, bytes_per_weight: int = 4) -> float:
    """Rough estimate of the factor by which decoding one token slows down on a CPU.

    Args:
        layer_parameters: parameters of one decoder layer. The rest of the model is ignored.
        depth: blocks per chain.
        bytes_per_weight: 4 for float32.
    """
    original = layer_parameters * bytes_per_weight / ASSUMED_BYTES_PER_SECOND + 5 * SECONDS_PER_BLOCK
    return (original + depth * SECONDS_PER_BLOCK) / original
