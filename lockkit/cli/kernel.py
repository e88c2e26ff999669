"""`lockkit kernel`: the fused operator for onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.app import app


@app.command()
def kernel(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="[EXPORT]", help="A locked export to put it into, for onnxruntime-genai and lockkit serve."
        ),
    ] = None,
) -> None:
    """Compile the operator that runs a whole chain in one call on the CPU, and print where it is.

    Locked exports of every precision run without it, and decode slower. It is compiled once, for this
    machine's processor; a C++ compiler must be installed. Weights stay fp16, int8 or int4 in memory.

    Examples:

        lockkit kernel                  # prints the library's path, for register_custom_ops_library

        lockkit kernel ./locked-onnx    # onnxruntime-genai and lockkit serve use it from now on
    """
    from lockkit.kernel import build_kernel, install_kernel

    typer.echo(install_kernel(export) if export else build_kernel())
