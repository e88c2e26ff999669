"""`lockkit web`: exports as transformers.js expects them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import console


def web(
    exports: Annotated[
        list[Path],
        typer.Argument(metavar="EXPORT", help="Export of the model; several for several precisions."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace it if lockkit wrote all of it.")] = False,
) -> None:
    """Arrange exports of one model for transformers.js.

    The folder that --out names gets the configuration, the tokenizer, a card, and each graph in onnx/
    under the name that the option `dtype` of transformers.js expects: model.onnx for fp32,
    model_fp16.onnx for fp16, model_quantized.onnx for q8 (int8), model_q4.onnx for q4 (int4). `lockkit
    push` uploads it.

    Examples:

    \b
        lockkit web ./locked-onnx ./locked-int4 --out ./locked-web
        lockkit push ./locked-web owner/my-model-web
    """
    from lockkit.publish.web import web_folder

    names = web_folder(exports, out, overwrite)
    listed = ", ".join(f"{name} ({dtype})" for dtype, name in names.items())
    console.print(f"wrote {out}: {listed}", soft_wrap=True)
