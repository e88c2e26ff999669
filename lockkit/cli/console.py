"""The terminal: the two consoles of all commands, and progress bars.

Text from a user or an exception may contain brackets and colons (`lockkit[attack]`, `my[bold]corpus.txt`). So the
consoles interpret neither markup nor emoji codes; styled text is a `rich.text.Text`.
"""

from __future__ import annotations

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from lockkit.progress import Progress

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


class TerminalProgress(Progress):
    """Progress on standard error: bars in a terminal, lines elsewhere. A context manager, which ends the bars.

    Attributes:
        bars: the display, with one bar per task.
    """

    _task: rich.progress.TaskID  # the current one

    def __init__(self) -> None:
        self.bars = rich.progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=errors,
            disable=not errors.is_terminal,
        )

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
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
