"""A fused operator for onnxruntime on the CPU: a whole chain in one call (`dlr_chain.cpp`).

It is optional: a locked export runs without it, block by block. It is compiled on the machine that
uses it, for that machine's processor, with the C++ compiler found there.
"""

from lockkit.kernel.build import build_kernel, find_kernel
from lockkit.kernel.install import has_kernel, install_kernel

__all__ = ["build_kernel", "find_kernel", "has_kernel", "install_kernel"]
