"""The public name of a model and the hash of its weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lockkit.files import sha256_of_file
from lockkit.models.weight_files import weight_files
from lockkit.settings import expanded


def public_name(name: str) -> str:
    """A name without local folders: `demo`, a Hub id, or the last part of a local path. It is valid Unicode."""
    path = Path(expanded(name))
    public = path.resolve().name if path.exists() else name
    # In an ASCII locale, Python decodes file names in another way.
    return os.fsencode(public).decode("utf-8", "replace")


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder, by its name in the folder. Files that are not read do not count.

    Raises:
        UsageError: there are no weight files, or they cannot be used.
    """
    return {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in weight_files(folder)}


def weights_sha256(folder: Path) -> str:
    """One SHA-256 over all weight files of a model folder, in the order of their names."""
    return combined_sha256(weight_hashes(folder))


def combined_sha256(hashes: dict[str, str]) -> str:
    """One SHA-256 over the hashes of files, by file name, in the order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(hashes.items()):
        total.update(f"{name} {value}\n".encode())
    return total.hexdigest()
