"""Whether the fused operator runs on this machine's GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

_SIZE = 256  # characters of an answer


@dataclass(frozen=True)
class KernelOnGpu:
    """What the operator for CUDA finds on this machine. One of the two is empty.

    Attributes:
        found: a description of the GPU that it runs on.
        problem: why it cannot run.
    """

    found: str
    problem: str


def kernel_on_gpu(library: Path) -> KernelOnGpu:
    """Start the CUDA driver and load the kernels for the GPU, as the operator does.

    Args:
        library: of `lockkit.kernel.build_kernel`.
    """
    loaded = ctypes.CDLL(str(library))
    if not hasattr(loaded, "lockkit_find_gpu"):
        return KernelOnGpu("", "there is an operator for CUDA on Linux only")
    found, problem = ctypes.create_string_buffer(_SIZE), ctypes.create_string_buffer(_SIZE)
    loaded.lockkit_find_gpu(found, problem, ctypes.c_size_t(_SIZE))
    return KernelOnGpu(found.value.decode(), problem.value.decode().removeprefix("DLRChain: "))
