"""The versions of lockkit and of the libraries that determine a result."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

__version__ = "0.1.0"

_REPORTED = [
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "safetensors",
    "tokenizers",
]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of lockkit, Python and the installed libraries that determine a result, by name."""
    found = {"lockkit": __version__, "python": platform.python_version()}
    for name in _REPORTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_hash() -> str | None:
    """The commit that lockkit runs from, with `-dirty` if files are changed. None outside a git checkout of lockkit."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() or None
