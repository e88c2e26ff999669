"""How fast an export runs, beside other exports and PyTorch models, in one run."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {"BenchConfig": "config", "Runtime": "config", "BenchResult": "run", "bench": "run"}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `lockkit --help` reads BenchConfig and must stay light.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
