"""A cache of large activations: in memory up to a budget, then in memory-mapped files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from lockkit.errors import UsageError
from lockkit.files import FULL

VALUE_BYTES = 4  # float32


class ActivationCache:
    """Named float32 tensors. They are in memory until the budget is used up, then in files in `folder`.

    Args:
        folder: for the files. Workers that share tensors must use the same folder.
        budget_bytes: total size of the tensors in memory.
    """

    def __init__(self, folder: Path, budget_bytes: int):
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.bytes_in_memory: dict[str, int] = {}

    def allocate(self, name: str, shape: tuple[int, ...], shared: bool = False) -> torch.Tensor:
        """A new, uninitialised tensor of `shape`. An earlier tensor of this name is released.

        It is in a file if it is `shared` with other workers, or if the budget is used up.

        Raises:
            UsageError: the disk of the folder is full.
        """
        size_bytes = math.prod(shape) * VALUE_BYTES
        self.release(name)
        if not shared and sum(self.bytes_in_memory.values()) + size_bytes <= self.budget_bytes:
            self.bytes_in_memory[name] = size_bytes
            return torch.empty(shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._file(name).open("wb") as file:
                _reserve(file.fileno(), size_bytes)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UsageError(
                f"the disk is full: activations need {size_bytes / 1e9:,.1f} GB in {self.folder}; "
                "free some space, change --work, or raise --cache-gigabytes"
            ) from error
        return self.attach(name, shape)

    def attach(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor that another worker has allocated as `shared` under this name."""
        return torch.from_file(str(self._file(name)), shared=True, size=math.prod(shape)).view(shape)

    def release(self, name: str) -> None:
        """Remove a tensor from the cache. Its memory or file is freed when no tensor uses it any more."""
        self.bytes_in_memory.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.float32"


def _reserve(file: int, size_bytes: int) -> None:
    """Reserve the space now. If the disk filled up later, a write to the mapped file would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size_bytes)
    else:
        os.truncate(file, size_bytes)
