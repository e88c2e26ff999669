"""A fused onnxruntime operator that computes a whole chain in one call, on the CPU (`dlr_chain.cpp`) and on NVIDIA GPUs
(`cuda/`).

It is optional: without it, a locked export runs block by block. It is compiled on the machine that uses it, for that
machine's processor, with an installed C++ compiler.
"""

from lockkit.kernel.build import build_kernel, find_kernel
from lockkit.kernel.gpu import KernelOnGpu, kernel_on_gpu
from lockkit.kernel.install import has_kernel, install_kernel, remove_kernel

__all__ = [
    "KernelOnGpu",
    "build_kernel",
    "find_kernel",
    "has_kernel",
    "install_kernel",
    "kernel_on_gpu",
    "remove_kernel",
]
