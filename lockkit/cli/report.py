"""`lockkit report`: results as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Folder with results of `lock`, `verify --json`, `bench --json` or `attack`, directly or one folder "
            "down; or such a file: lockkit.json, verify.json, bench.json, summary.json. Several are put on one page, and several "
            "audits are compared in one table.",
            metavar="RESULTS",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file to write. Default: report.html beside the first result.")
    ] = None,
) -> None:
    """Turn results into one HTML page that opens offline.

    The same content is written beside it as Markdown (.md) and JSON (.json). Existing files are
    replaced only if an earlier report wrote them. Needs matplotlib: pip install 'lockkit[report]'.

    Examples:

    \b
        lockkit report demo-locked
        lockkit report verify.json
        lockkit report audit-a audit-b --out audits.html
    """
    from lockkit.report.run import write_report

    written = write_report(results, out)
    console.print(
        f"{written.page}, {written.markdown.name} and {written.record.name}: "
        f"{written.sections} section{'' if written.sections == 1 else 's'}",
        soft_wrap=True,
    )
    for note in written.notes:
        console.print(note, soft_wrap=True)
