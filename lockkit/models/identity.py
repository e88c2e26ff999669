"""The public name of a model and the hash of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lockkit.files import sha256_of_file


def public_name(name: str) -> str:
    """A name without local folders: `demo`, a Hub id, or the last part of a local path."""
    return Path(name).resolve().name if Path(name).exists() else name


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder, by file name."""
    return {file.name: sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))}


def weights_sha256(folder: Path) -> str:
    """One SHA-256 over all weight files of a model folder, in the order of their names."""
    return combined_sha256(weight_hashes(folder))


def combined_sha256(hashes: dict[str, str]) -> str:
    """One SHA-256 over the hashes of files, by file name, in the order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(hashes.items()):
        total.update(f"{name} {value}\n".encode())
    return total.hexdigest()
