"""Speed and memory of an export, measured in one run with other exports and PyTorch models."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {"BenchConfig": "config", "Runtime": "config", "BenchResult": "run", "bench": "run"}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # A name is loaded when it is first used: `lockkit --help` reads BenchConfig and must not import the rest.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
