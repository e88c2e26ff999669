"""`lockkit serve`: an export behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.app import app
from lockkit.cli.console import errors, option
from lockkit.cli.options import config_from_options
from lockkit.errors import UsageError
from lockkit.serve.config import ServeConfig


@app.command()
def serve(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="What `lockkit export` wrote.")],
    host: Annotated[str | None, option(ServeConfig, "host")] = None,
    port: Annotated[int | None, option(ServeConfig, "port")] = None,
    name: Annotated[str | None, option(ServeConfig, "name")] = None,
    api_key_file: Annotated[Path | None, option(ServeConfig, "api_key_file")] = None,
    provider: Annotated[str | None, option(ServeConfig, "provider")] = None,
    threads: Annotated[int | None, option(ServeConfig, "threads")] = None,
    max_batch: Annotated[int | None, option(ServeConfig, "max_batch")] = None,
    max_queue: Annotated[int | None, option(ServeConfig, "max_queue")] = None,
    max_prompt_tokens: Annotated[int | None, option(ServeConfig, "max_prompt_tokens")] = None,
    max_output_tokens: Annotated[int | None, option(ServeConfig, "max_output_tokens")] = None,
    max_body_bytes: Annotated[int | None, option(ServeConfig, "max_body_bytes")] = None,
    max_connections: Annotated[int | None, option(ServeConfig, "max_connections")] = None,
    request_seconds: Annotated[float | None, option(ServeConfig, "request_seconds")] = None,
    read_seconds: Annotated[float | None, option(ServeConfig, "read_seconds")] = None,
    shutdown_seconds: Annotated[float | None, option(ServeConfig, "shutdown_seconds")] = None,
) -> None:
    """Serve EXPORT to OpenAI's clients, on this machine unless --host says otherwise.

    /v1/completions, /v1/chat/completions (where the model has a chat template), /v1/models,
    /health and /metrics. Requests are batched as they come. The export is compared with its
    manifest first, and no code from it runs. After `lockkit kernel EXPORT` the fused kernel compiled on
    this machine is used; /health and /metrics say so.

    Examples:

        lockkit serve locked-onnx

        LOCKKIT_API_KEY=... lockkit serve locked-onnx --host 0.0.0.0 --port 80 --max-batch 32
    """
    config = config_from_options(ServeConfig, locals())
    try:
        from lockkit.serve.server import serve_export
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'lockkit[serve]'") from error
    serve_export(export, config, lambda line: errors.print(line, soft_wrap=True, markup=False))
