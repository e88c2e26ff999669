"""How long jobs tell of their progress, without knowing about terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the course of a job; one task at a time."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` steps begins."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more steps are done; `note` is a short figure such as a loss."""

    def finish(self, note: str = "") -> None:
        """The task is done; `note` sums it up."""

    def say(self, line: str) -> None:
        """One line of information."""


class NoProgress:
    """Says nothing; the default of the Python API."""

    def start(self, task: str, total: int) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...
