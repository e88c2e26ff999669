"""The terminal: the two consoles of all commands, progress bars, and output that never stops a command.

Text from a user or an exception may contain brackets and colons (`lockkit[attack]`, `my[bold]corpus.txt`). So the
consoles interpret neither markup nor emoji codes; styled text is a `rich.text.Text`.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lockkit.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

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


def figures_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of figures for a terminal of 80 columns.

    No word is broken; only the names in the first column may wrap. Columns of numbers are aligned on the decimal point.

    Args:
        title: the heading.
        heads: of the columns, with units; a line break in a head keeps its column narrow.
        rows: texts; an empty one for no figure.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    columns = list(zip(*rows, strict=True)) or [()] * len(heads)
    table.add_column(heads[0], overflow="fold")
    shown = [list(columns[0])]
    for head, cells in zip(heads[1:], columns[1:], strict=True):
        if not any(re.match(r"\D?\d", cell) for cell in cells):  # names
            table.add_column(head, no_wrap=True)
            shown.append(list(cells))
            continue
        width = max(map(len, head.splitlines()), default=0)
        table.add_column(Text(head, justify="right"), no_wrap=True)
        shown.append([cell.rjust(width) for cell in on_the_point(cells)])
    for row in zip(*shown, strict=True):
        table.add_row(*row)
    return table


def on_the_point(cells: Sequence[str]) -> list[str]:
    """Numbers with spaces around them, so that their decimal points stand below each other. Other texts end with them."""
    parts = [re.fullmatch(r"(\D?[\d,]+)(\D.*)?", cell) for cell in cells]
    tails = [len(part[2] or "") if part else 0 for part in parts]
    longest = max(tails, default=0)
    padded = [
        cell + " " * (longest - tail) if part else cell for cell, part, tail in zip(cells, parts, tails, strict=True)
    ]
    width = max(map(len, padded), default=0)
    return [cell.rjust(width) for cell in padded]
