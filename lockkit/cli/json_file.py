"""`--json`: the same in every command. A path gets the figures; `-` prints them instead of the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from lockkit.files import check_output_file, readable_disk_errors, write_json

_PRINTED = Path("-")


def json_option(schema: str, more: str = "") -> Any:
    """The option of a command whose JSON has this schema.

    Args:
        schema: its name and version.
        more: what else the help says, after a comma.
    """
    text = f"Write all figures to this file as JSON (schema {schema}){more}; `-` prints them instead of the tables."
    return typer.Option("--json", metavar="<file>", help=text)


def check_json(path: Path | None) -> None:
    """Check the file before any work is done.

    Raises:
        UsageError: it cannot be written.
    """
    if path is not None and path != _PRINTED:
        check_output_file(path, "--json")


def write_figures(path: Path | None, figures: dict[str, Any]) -> bool:
    """Write or print the figures of a command, if `--json` asks for them.

    Returns:
        Whether the command shall print its tables.

    Raises:
        UsageError: the file cannot be written.
    """
    if path == _PRINTED:
        typer.echo(json.dumps(figures, indent=2, allow_nan=False))
        return False
    if path is not None:
        with readable_disk_errors(path, "--json"):
            write_json(path, figures)
    return True
