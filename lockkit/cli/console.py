"""The terminal: the two consoles of all commands, progress bars, and output that never stops a command.

Text from a user or an exception may contain brackets and colons (`lockkit[attack]`, `my[bold]corpus.txt`). So the
consoles interpret neither markup nor emoji codes; styled text is a `rich.text.Text`.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO, cast

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lockkit.progress import Progress

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


# Characters of lockkit's own texts, for terminals that do not have them. All others become a question mark.
_PLAIN = {"≤": "<=", "≥": ">=", "–": "-", "…": "..."}
_PLAIN_ERRORS = "lockkit-plain"


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(_PLAIN_ERRORS, _in_plain_characters)


class _TolerantStream:
    """Standard output or error. What it cannot write is lost: the first error is kept, and nothing is raised.

    Attributes:
        error: why text was lost; None so far.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAIN_ERRORS)

    def write(self, text: str) -> int:
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerant():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            # Otherwise Python writes what is in its buffer once more at the end, and fails again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError):
                os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Inside the `with` block, printing raises no error: neither for a character that the terminal's encoding lacks, nor
    for a closed pipe or a full disk. See `lost_output`.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, stream and _TolerantStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def lost_output() -> OSError | None:
    """Why standard output could not be written; None if everything was written. Only inside `tolerant_output`."""
    if not isinstance(sys.stdout, _TolerantStream):
        return None
    sys.stdout.flush()
    return sys.stdout.error


class TerminalProgress(Progress):
    """Progress on standard error: bars in a terminal, lines elsewhere. A context manager, which ends the bars.

    Elsewhere than in a terminal, a line at the start and at the end of each task, and one every `log_seconds` in between.

    Args:
        log_seconds: longest time without a line.

    Attributes:
        bars: the display, with one bar per task.
    """

    _task: rich.progress.TaskID  # the current one

    def __init__(self, log_seconds: float = 30) -> None:
        self.bars = rich.progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=errors,
            disable=not errors.is_terminal,
        )
        self._log_seconds = log_seconds
        self._stopped = threading.Event()
        self._logged_at = time.monotonic()
        self._log_thread = threading.Thread(target=self._log_regularly, daemon=True)

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        if not errors.is_terminal:
            self._log_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._log_thread.is_alive():
            self._log_thread.join()
        self.bars.stop()

    def start(self, task: str, total: int) -> None:
        self._task = self.bars.add_task(task, total=total, note="")
        self._log(f"{task} ...")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.bars.update(self._task, advance=steps, note=note)

    def finish(self, note: str = "") -> None:
        task = self.bars.tasks[-1]
        self.bars.update(task.id, completed=task.total, note=note)
        self.bars.stop_task(task.id)
        self._log(f"{task.description}: {note or 'done'}")

    def say(self, line: str) -> None:
        errors.print(line, soft_wrap=True)

    def _log(self, line: str) -> None:
        if not errors.is_terminal:
            errors.print(line, soft_wrap=True)
            self._logged_at = time.monotonic()

    def _log_regularly(self) -> None:
        """Print a line about the current task whenever there was none for `log_seconds`."""
        while not self._stopped.wait(max(0.01, self._logged_at + self._log_seconds - time.monotonic())):
            if time.monotonic() - self._logged_at >= self._log_seconds:
                task = self.bars.tasks[-1] if self.bars.tasks else None
                self._log("working ..." if task is None or task.stop_time else _status(task))


def _status(task: rich.progress.Task) -> str:
    """The state of a task in one line: steps, time, time left, and its note."""
    elapsed = task.elapsed or 0.0
    done, total = int(task.completed), int(task.total or 0)
    line = f"{task.description}: {done:,} of {total:,}, {duration(elapsed)}"
    if done:
        line += f", about {duration(elapsed / done * (total - done))} left"
    return f"{line}, {task.fields['note']}" if task.fields["note"] else line


def duration(seconds: float) -> str:
    """A time in the two units that matter: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
