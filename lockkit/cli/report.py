"""`lockkit report`: results as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with results of `lock`, `verify --json` or `attack`, directly or one folder down.",
            metavar="DIR",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file to write. Default: report.html in DIR.")] = None,
) -> None:
    """Turn results into one HTML page that opens offline.

    The same content is written beside it as Markdown (.md) and JSON (.json). Existing files are
    replaced only if an earlier report wrote them. Needs matplotlib: pip install 'lockkit[report]'.

    Examples:

    \b
        lockkit report demo-locked
        lockkit report results --out audit.html
    """
    from lockkit.report.run import write_report

    written = write_report(folder, out)
    console.print(
        f"{written.page}, {written.markdown.name} and {written.record.name}: "
        f"{written.sections} section{'' if written.sections == 1 else 's'}",
        soft_wrap=True,
    )
