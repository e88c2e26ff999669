"""`lockkit kernel`: the fused operator for onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import errors
from lockkit.errors import UsageError
from lockkit.targets import Provider


def kernel(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="EXPORT", help="Locked export that onnxruntime-genai and `lockkit serve` run with the operator."
        ),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the operator from EXPORT, which then runs everywhere again.")
    ] = False,
) -> None:
    """Compile the fused operator for chains and print its path.

    The operator computes a whole chain in one call. A locked export also runs without it, but decodes
    more slowly. It is compiled once, for this machine's processor, by the C++ compiler installed
    here. fp16, int8 and int4 weights keep their format in memory. The library has an operator for
    NVIDIA GPUs too; the command says whether this machine's GPU can run it.

    Without EXPORT, pass the printed path to onnxruntime's register_custom_ops_library. With EXPORT,
    the operator is installed in that folder: onnxruntime-genai and `lockkit serve` use it from now on.
    The folder then runs only on machines with this type of processor, and `lockkit push` refuses it;
    --remove undoes it.

    Examples:

    \b
        lockkit kernel
        lockkit kernel ./locked-onnx
        lockkit kernel ./locked-onnx --remove
    """
    from lockkit.export.manifest import read_manifest
    from lockkit.kernel import build_kernel, install_kernel, kernel_on_gpu, remove_kernel

    if remove:
        if export is None:
            raise UsageError("--remove belongs to an export: give EXPORT, too")
        typer.echo(f"removed the operator from {remove_kernel(export)}")
        return
    library = install_kernel(export) if export else build_kernel()
    typer.echo(library)
    if export is None or read_manifest(export).provider == Provider.cuda:
        gpu = kernel_on_gpu(library)
        missing = f"the operator cannot run here, {gpu.problem}"
        if export:
            missing = (
                f"no GPU here runs the operator ({gpu.problem}): {export}, an export for CUDA, uses it only on a machine "
                "with an NVIDIA GPU"
            )
        errors.print(f"GPU: {gpu.found or missing}", soft_wrap=True)
    if export:
        warning = f"{export} now runs only on this type of processor: before you publish or move it, add --remove"
        errors.print(warning, soft_wrap=True)
