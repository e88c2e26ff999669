"""What other commands read in the `lockkit.json` of a locked model (written by `lockkit/lock/record.py`)."""

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
        """The source of held-out text for this lock: that of its distillation text, else the standard library.

        Args:
            model: what the lock is called in an error.

        Raises:
            UsageError: the record names a file or folder that is not here.
        """
        source = self.distilled_on or "stdlib"
        if source != "stdlib" and "/" not in source and not Path(source).exists():  # the record has names, no paths
            raise UsageError(f"{model} was distilled on '{source}', which is not here: give its path as --data")
        return source


def read_lock_record(folder: Path, option: str) -> LockRecord:
    """Read the record in a model folder.

    Raises:
        UsageError: it is damaged. It names `option`.
    """
    path = folder / LOCK_RECORD
    return LockRecord(read_json(path, option) if path.is_file() else {})
