"""What all commands share: the terminal and its progress bars.

Text of a user or of an exception may hold brackets and colons (`lockkit[attack]`, `my[bold]corpus.txt`), so the
consoles read neither markup nor emoji codes. What is to be styled is a `rich.text.Text` with a style.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


class TerminalProgress:
    """`lockkit.progress.Progress` on standard error: bars in a terminal, lines in a log."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=errors,
            disable=not errors.is_terminal,
        )
        self.task: Any = None
        self.name = ""

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, task: str, total: int) -> None:
        self.name = task
        self.task = self.bars.add_task(task, total=total, note="")
        self._log(f"{task} ...")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.bars.update(self.task, advance=steps, note=note)

    def finish(self, note: str = "") -> None:
        self.bars.update(self.task, completed=self.bars.tasks[-1].total, note=note)
        self.bars.stop_task(self.task)
        self._log(f"{self.name}: {note or 'done'}")

    def say(self, line: str) -> None:
        errors.print(line, soft_wrap=True)

    def _log(self, line: str) -> None:
        if not errors.is_terminal:
            errors.print(line, soft_wrap=True)
