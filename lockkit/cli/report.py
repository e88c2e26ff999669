"""`lockkit report`: results as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console


def report(
    folder: Annotated[
        Path,
        typer.Argument(help="What `lock`, `verify --json` or `attack` wrote, or a folder of these.", metavar="DIR"),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page to write, an .html file. Default: report.html in DIR.")
    ] = None,
) -> None:
    """Turn results into one HTML page that opens offline.

    Markdown and JSON of the same content are written beside it.
    Needs matplotlib: pip install 'lockkit[report]'.

    Examples:

    \b
        lockkit report demo-locked
        lockkit report results --out audit.html
    """
    from lockkit.report.run import write_report

    written = write_report(folder, out)
    console.print(
        f"{written.page}, {written.markdown.name} and {written.record.name}: {written.sections} sections",
        soft_wrap=True,
    )
