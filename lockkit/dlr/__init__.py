"""The idea itself, in PyTorch alone: the DLR-Net and what it costs."""

from lockkit.dlr.net import DLRBlock, DLRNet, block_ranks

__all__ = ["DLRBlock", "DLRNet", "block_ranks"]
