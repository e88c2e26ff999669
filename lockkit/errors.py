"""Errors a user can act on: one line that names the cause and the option to change."""

from __future__ import annotations


class LockkitError(Exception):
    """Something went wrong that a user can mend; printed as one line, exit code 2."""


class UsageError(LockkitError):
    """The command, its options or its input files are not usable as given."""


class UnsupportedModelError(UsageError):
    """The model is of a kind that lockkit cannot lock or export."""


class DistillationError(LockkitError):
    """Distillation failed (a loss became NaN, say) and wrote no result."""


class GateFailed(LockkitError):
    """A check ran to its end and found the result wanting; exit code 1."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text that says anything, or the error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:most] if lines else type(error).__name__
