"""Tensors in memory that lockkit owns, as onnxruntime takes them, and the numbers in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

from lockkit.targets import BFLOAT16, ElementType

if TYPE_CHECKING:
    import numpy as np


class Tensor(NamedTuple):
    """A tensor in memory that the caller owns: onnxruntime's name of the device, the first address, shape and format."""

    device: str
    address: int
    shape: tuple[int, ...]
    kind: ElementType

    @classmethod
    def of(cls, array: np.ndarray, kind: ElementType) -> Self:
        """A contiguous array in the host's memory. The caller keeps it alive."""
        return cls("cpu", array.ctypes.data, array.shape, kind)

    def place(self) -> tuple[str, int, int, list[int], int]:
        """The arguments of `IOBinding.bind_input` that follow the name."""
        return self.device, 0, self.kind.onnx, list(self.shape), self.address


def as_float32(array: np.ndarray, kind: ElementType) -> np.ndarray:
    """Numbers of a format as float32; the same array if they are that already.

    Args:
        array: of the type `kind.numpy`. NumPy has no bfloat16: its bits come as integers, and are the upper half of
            those of the float32.
    """
    import numpy as np

    if kind is BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
