"""Errors that a user can act on. Each is one line that names the cause and the option to change."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class LockkitError(Exception):
    """A problem that a user can solve. The command line prints it as one line and exits with code 2."""


class UsageError(LockkitError):
    """The command, its options or its input files cannot be used as given."""


class UnsupportedModelError(UsageError):
    """lockkit cannot lock or export models of this kind."""


class DistillationError(LockkitError):
    """Distillation failed (for example, a loss became NaN) and wrote no result."""


class GateFailed(LockkitError):
    """A check completed, and a figure is beyond its limit. Exit code 1."""


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Let the errors about a model inside the `with` block name `option` instead of MODEL."""
    try:
        yield
    except UsageError as error:
        message = re.sub(r"\b(change|give) MODEL\b", rf"\1 {option}", str(error))
        raise type(error)(message) from error


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's text that is not blank, cut to `most` characters; the class name if there is none.

    If it ends with a colon, the line after it is added, which has the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    while lines[0].endswith(":") and len(lines) > 1:
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0][:most]


def counted(number: int, noun: str) -> str:
    """A number and a noun that takes an s in the plural: `1 layer`, `2,000 tokens`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
