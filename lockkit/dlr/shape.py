"""The sizes of an MLP and of the blocks that replace it. Imports no PyTorch, so that `lockkit plan` starts at once."""

from __future__ import annotations

from dataclasses import dataclass


def block_ranks(intermediate_size: int, depth: int) -> list[int]:
    """Divide an MLP's `intermediate_size` hidden units among `depth` blocks.

    If `depth` does not divide the width, the first blocks get one unit more. The ranks always add up to the width.

    Raises:
        ValueError: `depth` is not between 1 and `intermediate_size`.
    """
    if not 1 <= depth <= intermediate_size:
        raise ValueError(f"depth must be between 1 and the MLP's width {intermediate_size}, not {depth}")
    rank, remainder = divmod(intermediate_size, depth)
    return [rank + 1] * remainder + [rank] * (depth - remainder)


@dataclass(frozen=True)
class MLPShape:
    """Sizes of an MLP.

    Attributes:
        hidden_size: width of its input and output.
        intermediate_size: number of its hidden units.
        gated: it has gate, up and down matrices; otherwise up and down only.
        bias: the hidden units have biases.
        output_bias: the output has a bias.
    """

    hidden_size: int
    intermediate_size: int
    gated: bool = True
    bias: bool = False
    output_bias: bool = False
