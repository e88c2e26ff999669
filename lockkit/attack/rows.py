"""Rows of an audit: one run each, with its settings and its figures.

A row's key is a hash of everything it depends on. A row of the original depends on the lock only
where its attack uses something known of the lock (its depth, say). All other rows of the original
can be reused by other audits. `rows.jsonl` is only appended to, one line at a time, so several processes may
write to it.
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
    from lockkit.attack.bench import Bench

SCHEMA = "lockkit-attack/3"
ROWS = "rows.jsonl"
# What PyTorch says on CUDA, on Windows and on Linux; its class of error is a plain RuntimeError on the last two.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
AGAIN = ("out-of-memory", "failed", "unavailable")  # run again: on another machine, mended, or installed


class RowStore:
    """Rows of one folder, and rows of the original from others'."""

    def __init__(self, folder: Path, controls: Iterable[Path] = ()):
        self.file = folder / ROWS
        self._lock = FileLock(folder / f".{ROWS}.lock")
        with self._lock:
            self.file.touch()  # by it an audit is known, even one interrupted in its first run
            _mend(self.file)
        self._known = read_rows(self.file)
        self._controls: dict[str, dict] = {}
        for other in controls:
            found = read_rows(other / ROWS).items()
            self._controls |= {key: row for key, row in found if row["model"] == "original" and _is_done(row)}
        self.used: dict[str, dict] = {}  # rows of this audit by key, old and new, in order

    def row(self, head: dict, depends_on: list, work: Callable[[], dict]) -> dict:
        """The row of `depends_on`: read, taken from another audit, or made by `work`.

        An error in `work` is recorded in the row. Figures that are not finite are None in it.

        Args:
            head: what the row says of its run; its first entries.
            depends_on: everything that the figures depend on, as JSON can hold it.
        """
        key = key_of([SCHEMA, *depends_on])
        if key not in self.used:
            if not _is_done(self._known.get(key)):
                self._known = read_rows(self.file)  # another process may have made it
            if not _is_done(self._known.get(key)):
                if key in self._controls:
                    row = self._controls[key] | {"reused": True}
                else:
                    row = finite({"schema": SCHEMA, "key": key, **head, **guarded(work), "reused": False})
                if row != self._known.get(key):  # tried again to the same end
                    self._append(row)
            self.used[key] = self._known[key]
        return self.used[key]

    def _append(self, row: dict) -> None:
        self._known[row["key"]] = row
        with self._lock, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def head_of(attack: type[Attack], config: dict, task: str | None, subject: str) -> dict:
    """What a row says of its run."""
    return {
        "attack": attack.name,
        "family": attack.family,
        "lock_aware": attack.lock_aware,
        "model": subject,
        "task": task,
        "config": config,
    }


def depends_on(bench: Bench, attack: type[Attack], config: dict, task: str | None, subject: str) -> list:
    """Everything that a row's figures depend on: settings and hashes.

    A row of the original does not depend on the lock, except for attacks that know it: they work on the
    original in the lock's shape, may read unlabelled text, and may spend as many tokens as the lock took.
    """
    identity = bench.identity()
    if subject == "original":
        del identity["locked_sha256"]
        if attack.lock_aware:
            identity |= {"shape": bench.lock_shape, "lock_tokens": bench.lock_tokens}
        else:
            identity = {key: identity[key] for key in ("original_sha256", "device")}
    return [attack.name, config, subject, bench.tasks[task].record() if task else None, identity]


def check_controls(controls: Iterable[Path]) -> None:
    """Check that all folders are audits.

    Raises:
        UsageError: one is not.
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
        reason = " ".join(str(error).split())[:200]
        return {
            "status": "out-of-memory" if memory else "failed",
            "note": "out of memory" if memory else f"{type(error).__name__}: {reason}",
        }
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, at any depth: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> dict[str, dict]:
    """Rows of this schema by key, the last of each. Lines that are no such row (cut short, older) are ignored."""
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
    """Remove a last line that was cut short, so that the next row starts on a new line."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
