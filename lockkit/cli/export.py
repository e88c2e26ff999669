"""`lockkit export`: a model as an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import TerminalProgress, console
from lockkit.export.config import ExportConfig


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Locked or original model: a local folder, a `.gguf` file, a Hub id, or `demo`."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    config: ExportConfig,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if lockkit wrote all of it.")] = False,
) -> None:
    """Write MODEL as an ONNX graph to OUT.

    onnxruntime, onnxruntime-genai, optimum and transformers.js run OUT, without lockkit. It contains
    the graph and its weights, the configuration files and tokenizer that those programs expect, a
    card, MODEL's licence files, and a manifest with the hash of every file but the card.

    Examples:

    \b
        lockkit export demo demo-onnx
        lockkit export ./locked ./locked-onnx --precision int8
        lockkit export ./locked ./locked-cuda --precision fp16 --provider cuda
    """
    from lockkit.export.run import export_model

    with TerminalProgress() as progress:
        result = export_model(model, out, config, overwrite=overwrite, progress=progress)
    kind = "locked" if result.manifest.locked else "original"
    console.print(
        f"wrote {out}: {kind} {result.manifest.model_type}, {result.manifest.precision} for {config.provider.value}, "
        f"{result.size_bytes / 1e6:,.1f} MB",
        soft_wrap=True,
    )
    if warning := result.origin.warning(out):
        console.print(warning, soft_wrap=True)
