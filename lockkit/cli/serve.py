"""`lockkit serve`: serve an export through an OpenAI-compatible HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import errors
from lockkit.errors import UsageError
from lockkit.serve.config import ServeConfig


def serve(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder that `lockkit export` wrote.")],
    config: ServeConfig,
) -> None:
    """Serve EXPORT through an OpenAI-compatible HTTP interface.

    Endpoints: /v1/completions, /v1/chat/completions (if the model has a chat template), /v1/models,
    /health and /metrics. Concurrent requests are batched. Only this machine can connect, unless
    --host says otherwise.

    At the start, EXPORT is checked against its manifest. No code from it runs. After `lockkit kernel
    EXPORT`, the server uses the fused operator compiled on this machine; /health and /metrics show it.

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
