"""The parts of a locked model's `lockkit.json` that other commands read. lockkit/lock/record.py writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockkit.errors import UsageError
from lockkit.files import LOCK_RECORD, read_json


@dataclass(frozen=True)
class LockRecord:
    """The record of a lock.

    Attributes:
        values: the content of `lockkit.json`; empty if the folder has none.
    """

    values: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of the lock."""
        recipe = self.values.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @property
    def distilled_on(self) -> str | None:
        """Name of the distillation text. None if it is unknown or was sampled from the original (`self`)."""
        source = self.recipe.get("data")
        return source if isinstance(source, str) and source not in ("", "auto", "self") else None

    @property
    def data_column(self) -> str | None:
        """The column of the distillation text that the recipe names; None if it names none."""
        column = self.recipe.get("data_column")
        return column if isinstance(column, str) else None

    @property
    def tokens(self) -> int:
        """Tokens of both phases of distillation; 0 if the record does not say."""
        return self.recipe.get("tokens", 0) + self.recipe.get("end_to_end_tokens", 0)

    def source(self, model: str) -> str:
        """The source of held-out text for this lock: the source of its distillation text, or else `stdlib`.

        Args:
            model: name of the lock, for the error.

        Raises:
            UsageError: the record names a file or folder that does not exist here.
        """
        source = self.distilled_on or "stdlib"
        if source != "stdlib" and "/" not in source and not Path(source).exists():  # names, not paths
            raise UsageError(f"{model} was distilled on '{source}', which does not exist here: give its path as --data")
        return source


def read_lock_record(folder: Path, option: str) -> LockRecord:
    """Read the record of a model folder.

    Args:
        folder: of the locked model.
        option: the option that gave it, for the error.

    Raises:
        UsageError: the record is not valid JSON.
    """
    path = folder / LOCK_RECORD
    return LockRecord(read_json(path, option) if path.is_file() else {})
