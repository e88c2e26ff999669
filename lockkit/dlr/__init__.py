"""The DLR-Net, in PyTorch alone: the network, the MLP it replaces, views of its weights, and its cost.

A name is imported when it is first used: sizes and costs (shape.py, cost.py) need no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockkit.dlr.mlp import MLPWeights
    from lockkit.dlr.net import ChainConfig, DLRBlock, DLRNet
    from lockkit.dlr.shape import MLPShape, block_ranks
    from lockkit.dlr.view import Step, block_weights, load_side_by_side, side_by_side, walk

_HOMES = {
    "lockkit.dlr.mlp": ("MLPWeights",),
    "lockkit.dlr.net": ("ChainConfig", "DLRBlock", "DLRNet"),
    "lockkit.dlr.shape": ("MLPShape", "block_ranks"),
    "lockkit.dlr.view": ("Step", "block_weights", "load_side_by_side", "side_by_side", "walk"),
}
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


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'lockkit.dlr' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
