"""`lockkit kernel`: the fused operator for onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def kernel(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="EXPORT", help="Locked export that onnxruntime-genai and `lockkit serve` run with the operator."
        ),
    ] = None,
) -> None:
    """Compile the fused CPU operator for chains and print its path.

    The operator computes a whole chain in one call. A locked export also runs without it, but decodes
    more slowly. It is compiled once, for this machine's processor, by the C++ compiler installed
    here. fp16, int8 and int4 weights keep their format in memory.

    Without EXPORT, pass the printed path to onnxruntime's register_custom_ops_library. With EXPORT,
    the operator is installed in that folder: onnxruntime-genai and `lockkit serve` use it from now on.

    Examples:

    \b
        lockkit kernel
        lockkit kernel ./locked-onnx
    """
    from lockkit.kernel import build_kernel, install_kernel

    typer.echo(install_kernel(export) if export else build_kernel())
