"""Progress of long jobs, for any kind of display."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far a job is; one task at a time."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` steps begins."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more steps are done; `note` is a short figure such as a loss."""

    def finish(self, note: str = "") -> None:
        """The task is done; `note` sums it up."""

    def say(self, line: str) -> None:
        """One line of information."""


class NoProgress:
    """Shows nothing; the default of the Python API."""

    def start(self, task: str, total: int) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...
