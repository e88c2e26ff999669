"""`lockkit verify`: an export against PyTorch, with gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.app import app
from lockkit.cli.console import TerminalProgress, console, option
from lockkit.cli.options import config_from_options
from lockkit.errors import GateFailed, UsageError
from lockkit.verify.config import VerifyConfig


@app.command()
def verify(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder that `lockkit export` wrote.")],
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="PyTorch model to compare with: `demo`, a folder, or a Hub id. Give the locked model, the "
            "original, or both; which is which is seen from their configurations."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write all figures here, also when a gate fails; schema lockkit-verify/1.")
    ] = None,
    data: Annotated[str | None, option(VerifyConfig, "data")] = None,
    tokens: Annotated[int | None, option(VerifyConfig, "tokens")] = None,
    block_tokens: Annotated[int | None, option(VerifyConfig, "block_tokens")] = None,
    prompts: Annotated[int | None, option(VerifyConfig, "prompts")] = None,
    new_tokens: Annotated[int | None, option(VerifyConfig, "new_tokens")] = None,
    tie_tolerance: Annotated[float | None, option(VerifyConfig, "tie_tolerance")] = None,
    provider: Annotated[str | None, option(VerifyConfig, "provider")] = None,
    seed: Annotated[int | None, option(VerifyConfig, "seed")] = None,
    max_kl: Annotated[float | None, option(VerifyConfig, "max_kl")] = None,
    min_top1: Annotated[float | None, option(VerifyConfig, "min_top1")] = None,
    max_perplexity_ratio: Annotated[float | None, option(VerifyConfig, "max_perplexity_ratio")] = None,
    min_continuations: Annotated[float | None, option(VerifyConfig, "min_continuations")] = None,
) -> None:
    """Check an export against the PyTorch model it was made from, and hold it to limits.

    Logits on held-out text are compared without a cache, with one, and in a padded batch; then
    greedy continuations and perplexity. Exit code 1 says that a gate failed.

    Examples:

        lockkit verify demo-onnx --reference demo

        lockkit verify locked-onnx --reference demo --reference demo-locked --json verify.json

        lockkit verify locked-int4 --reference demo --reference demo-locked --max-perplexity-ratio 1.1
    """
    config = config_from_options(VerifyConfig, locals())
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise UsageError(f"{json} is a folder, or in a folder that does not exist: change --json")

    from lockkit.verify.run import verify_export
    from lockkit.verify.table import failure_line, print_result

    with TerminalProgress() as progress:
        result = verify_export(export, reference or [], config, progress)
    print_result(result, console)
    if json is not None:
        try:
            result.write(json)
        except OSError as error:
            raise UsageError(f"cannot write {json} ({error.strerror}): change --json") from error
    if not result.passed:
        raise GateFailed(failure_line(result))
