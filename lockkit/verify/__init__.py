"""Proof that an export is the model it was made from: parity, perplexity, gates."""

from __future__ import annotations

import importlib

_WHERE = {
    "Gates": "figures",
    "VerifyConfig": "config",
    "VerifyResult": "result",
    "verify_export": "run",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    # Loaded when first asked for: `lockkit --help` reads VerifyConfig and must not import PyTorch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
