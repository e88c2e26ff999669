"""`lockkit serve`: an export behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import errors
from lockkit.errors import UsageError
from lockkit.serve.config import ServeConfig


def serve(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="What `lockkit export` wrote.")],
    config: ServeConfig,
) -> None:
    """Serve EXPORT to OpenAI's clients.

    It listens on this machine alone unless --host says otherwise. /v1/completions,
    /v1/chat/completions (where the model has a chat template), /v1/models, /health and /metrics.
    Requests are batched as they come. The export is compared with its manifest first, and no code
    from it runs. After `lockkit kernel EXPORT` the fused kernel compiled on this machine is used;
    /health and /metrics say so.

    Examples:

    \b
        lockkit serve locked-onnx
        LOCKKIT_API_KEY=... lockkit serve locked-onnx --host 0.0.0.0 --port 80
    """
    try:
        from lockkit.serve.server import serve_export
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'lockkit[serve]'") from error
    serve_export(export, config, lambda line: errors.print(line, soft_wrap=True))
