"""`lockkit export`: a model as an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.app import app
from lockkit.cli.console import TerminalProgress, console, option
from lockkit.cli.options import config_from_options
from lockkit.export.config import ExportConfig, Precision, Provider


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A locked or an original model: a local folder, a Hub id, or `demo`.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    precision: Annotated[Precision | None, option(ExportConfig, "precision")] = None,
    provider: Annotated[Provider | None, option(ExportConfig, "provider")] = None,
    block_size: Annotated[int | None, option(ExportConfig, "block_size")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if lockkit wrote it.")] = False,
) -> None:
    """Write MODEL as an ONNX graph that onnxruntime, onnxruntime-genai, optimum and transformers.js serve.

    OUT gets the graph and its weights, the configurations and the tokenizer that those programs
    look for, and a manifest with the hash of every file. Nothing in it needs lockkit.

    Examples:

        lockkit export demo demo-onnx

        lockkit export ./locked ./locked-onnx --precision int8

        lockkit export ./locked ./locked-cuda --precision fp16 --provider cuda --overwrite
    """
    config = config_from_options(ExportConfig, locals())
    from lockkit.export.run import export_model

    with TerminalProgress() as progress:
        result = export_model(model, out, config, progress)
    kind = "locked" if result.manifest.locked else "original"
    console.print(
        f"wrote {out}: {kind} {result.manifest.model_type}, {config.precision.value} for {config.provider.value}, "
        f"{result.size_bytes / 1e6:,.1f} MB",
        soft_wrap=True,
    )
