"""A fused onnxruntime operator for the CPU that computes a whole chain in one call (`dlr_chain.cpp`).

It is optional: without it, a locked export runs block by block. It is compiled on the machine that uses it, for that
machine's processor, with an installed C++ compiler.
"""

from lockkit.kernel.build import build_kernel, find_kernel
from lockkit.kernel.install import has_kernel, install_kernel, remove_kernel

__all__ = ["build_kernel", "find_kernel", "has_kernel", "install_kernel", "remove_kernel"]
