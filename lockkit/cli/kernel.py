"""`lockkit kernel`: the fused operator for onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def kernel(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="EXPORT", help="A locked export to put it into, for onnxruntime-genai and lockkit serve."
        ),
    ] = None,
) -> None:
    """Compile the fused CPU operator of a chain and print its path.

    It computes a whole chain in one call. Locked exports of every precision run without it, and
    decode slower. It is compiled once, for this machine's processor; a C++ compiler must be
    installed. Weights stay fp16, int8 or int4 in memory. Without EXPORT the path is for
    onnxruntime's register_custom_ops_library; with it, onnxruntime-genai and lockkit serve use the
    operator from now on.

    Examples:

    \b
        lockkit kernel
        lockkit kernel ./locked-onnx
    """
    from lockkit.kernel import build_kernel, install_kernel

    typer.echo(install_kernel(export) if export else build_kernel())
