"""The rows of an audit. A row holds the settings and the figures of one run.

The key of a row is a hash of everything that its figures depend on. A row of the original depends on the lock only if
its attack uses knowledge of the lock, such as its depth. Other audits can reuse all other rows of the original.
Lines are only appended to `rows.jsonl`, one at a time, so several processes may write to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from lockkit.attack.base import CannotRun
from lockkit.errors import UsageError

if TYPE_CHECKING:
    from lockkit.attack.base import Attack
    from lockkit.attack.subjects import Subjects

SCHEMA = "lockkit-attack/4"
ROWS = "rows.jsonl"
# PyTorch's messages on CUDA, on Windows and on Linux. On the last two it raises a plain RuntimeError.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
AGAIN = ("out-of-memory", "failed", "unavailable")  # runs that ended so are tried again when an audit resumes


class RowStore:
    """The rows of one audit folder.

    Args:
        folder: the audit's folder; `rows.jsonl` is created in it.
        controls: folders of other audits. Their finished rows of the original are reused.

    Attributes:
        used: the rows of this audit by key, in the order in which they were requested.
    """

    def __init__(self, folder: Path, controls: Iterable[Path] = ()):
        self.file = folder / ROWS
        self._lock = FileLock(folder / f".{ROWS}.lock")
        with self._lock:
            self.file.touch()  # marks the folder as an audit, even if the first run is interrupted
            _mend(self.file)
        self._known = read_rows(self.file)
        self._controls: dict[str, dict] = {}
        for other in controls:
            found = read_rows(other / ROWS).items()
            self._controls |= {key: row for key, row in found if row["model"] == "original" and _is_done(row)}
        self.used: dict[str, dict] = {}

    def row(self, head: dict, depends_on: list, work: Callable[[], dict]) -> dict:
        """Return the row of a run: read from the file, reused from another audit, or computed by `work`.

        An error in `work` is recorded in the row. Figures that are not finite are None in it.

        Args:
            head: the first entries of the row, which describe the run.
            depends_on: everything that the figures depend on, as JSON values.
            work: runs the attack and returns the figures.
        """
        key = key_of([SCHEMA, *depends_on])
        if key not in self.used:
            if not _is_done(self._known.get(key)):
                self._known = read_rows(self.file)  # another process may have added it
            if not _is_done(self._known.get(key)):
                if key in self._controls:
                    row = self._controls[key] | {"reused": True}
                else:
                    row = finite({"schema": SCHEMA, "key": key, **head, **guarded(work), "reused": False})
                if row != self._known.get(key):  # it is, if the run was tried again and ended the same way
                    self._append(row)
            self.used[key] = self._known[key]
        return self.used[key]

    def _append(self, row: dict) -> None:
        self._known[row["key"]] = row
        with self._lock, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def head_of(attack: type[Attack], config: dict, task: str | None, subject: str) -> dict:
    """The first entries of a row, which describe its run."""
    return {
        "attack": attack.name,
        "family": attack.family,
        "lock_aware": attack.lock_aware,
        "off_the_shelf": getattr(attack, "off_the_shelf", False),
        "model": subject,
        "task": task,
        "config": config,
    }


def depends_on(subjects: Subjects, attack: type[Attack], config: dict, task: str | None, subject: str) -> list:
    """Everything that the figures of a row depend on: settings and hashes.

    A row of the original does not depend on the lock, with one exception. Attacks that use knowledge of the lock work
    on the original in the lock's shape, may read unlabelled text, and may have a budget in multiples of the lock's.
    """
    identity = subjects.identity()
    if subject == "original":
        locked = identity.pop("locked_sha256")
        if attack.lock_aware:
            identity |= {"shape": subjects.lock_shape, "lock_tokens": subjects.lock_tokens}
        else:
            identity = {key: identity[key] for key in ("original_sha256", "device", "evaluation_sha256")}
            if config.get("capacity_of") == "locked":  # the lock's shape decides how many parameters are trained
                identity["shape"] = subjects.lock_shape or locked
    return [attack.name, config, subject, subjects.tasks[task].record() if task else None, identity]


def check_controls(controls: Iterable[Path]) -> None:
    """Check that all folders are audits.

    Raises:
        UsageError: a folder is not an audit.
    """
    for folder in controls:
        if not (folder / ROWS).is_file():
            raise UsageError(f"{folder} is not an audit (it has no {ROWS}): change --controls")


def key_of(parts: list) -> str:
    """SHA-256 of `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def guarded(work: Callable[[], dict]) -> dict:
    """Run `work` and record how it ended: finished, diverged, unavailable, out-of-memory or failed."""
    try:
        found = work()
        return {"status": "diverged" if found.get("diverged") else "finished", "note": "", **found}
    except CannotRun as reason:
        return {"status": "unavailable", "note": str(reason)}
    except Exception as error:
        memory = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        message = " ".join(str(error).split())[:200]
        return {
            "status": "out-of-memory" if memory else "failed",
            "note": "out of memory" if memory else f"{type(error).__name__}: {message}",
        }
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def finite(value: Any) -> Any:
    """`value` with None in place of every NaN and infinity, at any depth, because JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of a file by key; of rows with the same key, the last. Incomplete lines and older schemas are ignored."""
    found: dict[str, dict] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("schema") == SCHEMA:
            found[row["key"]] = row
    return found


def _is_done(row: dict | None) -> bool:
    return row is not None and row["status"] not in AGAIN


def _mend(path: Path) -> None:
    """Remove an incomplete last line, so that the next row starts on a new line."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
