"""Large activations: in memory up to a budget, beyond it in memory-mapped files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from lockkit.errors import UsageError
from lockkit.files import FULL

VALUE_BYTES = 4  # float32


class ActivationCache:
    """Hands out float32 tensors by name; spills to `folder` when the budget is used up.

    Args:
        folder: where files go; workers that share tensors must share it.
        budget_bytes: memory that tensors may take together before files are used.
    """

    def __init__(self, folder: Path, budget_bytes: int):
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.in_memory: dict[str, int] = {}

    def allocate(self, name: str, shape: tuple[int, ...], shared: bool = False) -> torch.Tensor:
        """A tensor of `shape`, uninitialised; in a file if it is `shared` or the budget is used up.

        Raises:
            UsageError: the folder's disk is full.
        """
        size = math.prod(shape) * VALUE_BYTES
        self.release(name)
        if not shared and sum(self.in_memory.values()) + size <= self.budget_bytes:
            self.in_memory[name] = size
            return torch.empty(shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._file(name).open("wb") as file:
                _reserve(file.fileno(), size)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UsageError(
                f"the disk is full: activations need {size / 1e9:,.1f} GB in {self.folder}; "
                "free some space, change --work, or raise --cache-gigabytes"
            ) from error
        return self.attach(name, shape)

    def attach(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that another worker has allocated as `shared`."""
        return torch.from_file(str(self._file(name)), shared=True, size=math.prod(shape)).view(shape)

    def release(self, name: str) -> None:
        """Forget a tensor: its memory returns when its last user is gone."""
        self.in_memory.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.float32"


def _reserve(file: int, size: int) -> None:
    """Claim the space now: a mapped file on a disk that fills up later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
