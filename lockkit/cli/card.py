"""`lockkit card`: results in a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console
from lockkit.errors import UsageError


def card(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Locked folder or export.")],
    verify: Annotated[
        Path | None, typer.Option("--verify", help="JSON of `lockkit verify`, of the export or of one of the lock.")
    ] = None,
    audit: Annotated[
        Path | None, typer.Option("--audit", help="Folder of `lockkit attack` on the lock, or its summary.json.")
    ] = None,
    bom: Annotated[
        bool, typer.Option("--bom", help="Also write bom.cdx.json: a bill of materials (CycloneDX) with the lineage.")
    ] = False,
    lock: Annotated[
        Path | None, typer.Option("--lock", help="Locked folder of an export: its recipe and texts go into the bill.")
    ] = None,
) -> None:
    """Write results into the model card of FOLDER.

    The card gets parity and perplexity, what the lock is worth, and a `model-index`, which the Hub
    reads. What you wrote into the card stays. Results of another model are refused. --bom needs
    cyclonedx-python-lib: pip install 'lockkit[sign]'.

    Examples:

    \b
        lockkit card ./locked-onnx --verify verify.json --audit ./audit
        lockkit card ./locked --audit ./audit --bom
    """
    from lockkit.publish.bom import write_bom
    from lockkit.publish.card import write_card

    if lock is not None and not bom:
        raise UsageError("--lock belongs to a bill of materials: give --bom, too")
    console.print(f"wrote {write_card(folder, verify, audit)}", soft_wrap=True)
    if bom:
        console.print(f"wrote {write_bom(folder, lock)}", soft_wrap=True)
