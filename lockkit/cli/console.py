"""What all commands share: the terminal, progress bars, and options taken from a recipe class."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def option(config: type[BaseModel], field: str, *names: str, **settings: Any) -> Any:
    """A Typer option for `config.field`: its help is the field's description, its default stays there.

    The parameter itself must default to None, which means "not given".
    """
    info = config.model_fields[field]
    values = info.default if isinstance(info.default, list) else [info.default]
    default = "" if info.default is None or info.is_required() else f" [default: {', '.join(map(str, values))}]"
    if get_origin(info.annotation) is Literal:
        settings.setdefault("metavar", "|".join(map(str, get_args(info.annotation))))
    return typer.Option(
        *(names or ("--" + field.replace("_", "-"),)),
        help=f"{info.description}{default}",
        show_default=False,
        **settings,
    )


class TerminalProgress:
    """`lockkit.progress.Progress` on standard error: bars in a terminal, lines in a log."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
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
