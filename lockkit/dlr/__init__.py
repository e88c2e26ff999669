"""The DLR-Net, in PyTorch alone: the network, the MLP it replaces, views of its weights, and its cost."""

from lockkit.dlr.mlp import MLPShape, MLPWeights
from lockkit.dlr.net import ChainConfig, DLRBlock, DLRNet, block_ranks
from lockkit.dlr.view import Step, block_weights, load_side_by_side, side_by_side, walk

__all__ = [
    "ChainConfig",
    "DLRBlock",
    "DLRNet",
    "MLPShape",
    "MLPWeights",
    "Step",
    "block_ranks",
    "block_weights",
    "load_side_by_side",
    "side_by_side",
    "walk",
]
