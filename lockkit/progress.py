"""Progress of long jobs: the interface that a display implements."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a job. Tasks run one at a time."""

    def start(self, task: str, total: int) -> None:
        """Begin a task of `total` steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more steps as done. `note` is a short figure, such as a loss."""

    def finish(self, note: str = "") -> None:
        """End the task. `note` is its result in a few words."""

    def say(self, line: str) -> None:
        """Show one line of information."""


class NoProgress(Progress):
    """Shows nothing. The default of the Python API."""

    def start(self, task: str, total: int) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...
