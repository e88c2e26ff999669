"""The entries of a locked model's `lockkit.json` that other commands read. `lockkit/lock/record.py` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockkit.errors import UsageError
from lockkit.files import LOCK_RECORD, read_json


@dataclass(frozen=True)
class LockRecord:
    """The record of a lock; empty if the folder has none."""

    values: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of the lock."""
        recipe = self.values.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @property
    def distilled_on(self) -> str | None:
        """The name of the distillation text. None if it is not known, or was sampled from the original (`self`)."""
        source = self.recipe.get("data")
        return source if isinstance(source, str) and source not in ("", "auto", "self") else None

    @property
    def tokens(self) -> int:
        """Tokens of both phases of distillation; 0 if the record does not say."""
        return self.recipe.get("tokens", 0) + self.recipe.get("end_to_end_tokens", 0)

    def source(self, model: str) -> str:
        """The source of held-out text for this lock: its distillation text if that is known, else `stdlib`.

        Args:
            model: name of the lock in error messages.

        Raises:
            UsageError: the record names a file or folder that does not exist here.
        """
        source = self.distilled_on or "stdlib"
        if (
            source != "stdlib" and "/" not in source and not Path(source).exists()
        ):  # the record has names without folders
            raise UsageError(f"{model} was distilled on '{source}', which is not here: give its path as --data")
        return source


def read_lock_record(folder: Path, option: str) -> LockRecord:
    """Read the record in a model folder.

    Raises:
        UsageError: the record is damaged. The message names `option`.
    """
    path = folder / LOCK_RECORD
    return LockRecord(read_json(path, option) if path.is_file() else {})
