"""Check that an export is the model it was made from: parity, perplexity, gates.

config.py      the settings
references.py  the PyTorch models to compare with, and the held-out text
parity.py      the comparisons
figures.py     the figures and their gates
result.py      the result, as JSON
table.py       the result, as tables in a terminal
run.py         all steps together
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Gates": "figures",
    "VerifyConfig": "config",
    "VerifyResult": "result",
    "verify_export": "run",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # Loaded on first use, because `lockkit --help` reads VerifyConfig and must not import PyTorch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
