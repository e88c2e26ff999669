"""Rows of an audit: what was run, under which settings, and what it gave.

A row's key is a hash of everything it depends on. Rows of the original do not depend on the lock,
but for what attacks that know the lock need of it (its depth): another audit's can be reused.
`rows.jsonl` only ever grows, a line at a time, so several processes may write to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from lockkit.attack.base import CannotRun
from lockkit.errors import UsageError

if TYPE_CHECKING:
    from lockkit.attack.base import Attack
    from lockkit.attack.bench import Bench

SCHEMA = "lockkit-attack/2"
ROWS = "rows.jsonl"
# What PyTorch says on CUDA, on Windows and on Linux; its class of error is a plain RuntimeError on the last two.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
AGAIN = ("out-of-memory", "failed", "unavailable")  # worth another try: elsewhere, mended, installed


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

        Whatever goes wrong in `work` stays in its row; `head` comes first in it.
        """
        key = key_of([SCHEMA, *depends_on])
        if key not in self.used:
            if not _is_done(self._known.get(key)):
                self._known = read_rows(self.file)  # another process may have made it
            if not _is_done(self._known.get(key)):
                if key in self._controls:
                    row = self._controls[key] | {"reused": True}
                else:
                    row = {"schema": SCHEMA, "key": key, **head, **guarded(work), "reused": False}
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
    """Everything that a row's figures depend on, settings and hashes.

    A row of the original knows no lock, but those of attacks that use what is known of it: they work
    on the original in the lock's shape, may read unlabelled text, and spend as many tokens as it took.
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
    """Raise UsageError unless all are audits."""
    for folder in controls:
        if not (folder / ROWS).is_file():
            raise UsageError(f"{folder} is not an audit (it has no {ROWS}): change --controls")


def key_of(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def guarded(work: Callable[[], dict]) -> dict:
    """Run; tell apart finished, diverged, not possible here, out of memory, failed."""
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


def read_rows(path: Path) -> dict[str, dict]:
    """Rows of this schema by key, the last of each; lines that are none (cut short, older) are passed over."""
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
    """Take off a last line that was cut short, so that the next row starts on one of its own."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
