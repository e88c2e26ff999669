"""lockkit: lock a pretrained language model, export it to ONNX, prove it is the same model.

The Python API has the same verbs as the command line, with the same names and defaults:

    from lockkit import LockConfig, lock_model, export_model, verify_export

Names are loaded when first used, so that `import lockkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from lockkit.version import __version__

_HOMES = {
    "plan_model": "lockkit.lock.plan",
    "LockConfig": "lockkit.lock.config",
    "lock_model": "lockkit.lock.run",
    "ExportConfig": "lockkit.export.config",
    "export_model": "lockkit.export.run",
    "VerifyConfig": "lockkit.verify.config",
    "verify_export": "lockkit.verify.run",
    "ServeConfig": "lockkit.serve.config",
    "serve_export": "lockkit.serve.server",
    "open_app": "lockkit.serve.server",
    "describe_environment": "lockkit.environment",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lockkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
