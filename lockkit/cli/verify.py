"""`lockkit verify`: compare an export with the models it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.cli.console import TerminalProgress, console
from lockkit.cli.json_file import check_json, json_option, write_figures
from lockkit.errors import GateFailed, UsageError
from lockkit.publish.config import CheckConfig
from lockkit.settings import option_of
from lockkit.verify.config import VerifyConfig


def verify(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder that `lockkit export` wrote.")],
    reference: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            help="PyTorch model to compare with: `demo`, a folder, or a Hub id. Give the locked model, the "
            "original, or both, in any order.",
        ),
    ] = None,
    json: Annotated[Path | None, json_option("lockkit-verify/1", ", also if a gate fails")] = None,
    *,
    config: VerifyConfig,
    signed: CheckConfig,
) -> None:
    """Compare EXPORT with the PyTorch model it was made from.

    Logits on held-out text are compared without a cache, with a cache, and in a padded batch. Greedy
    continuations and perplexity are compared as well. Gates are limits on these figures. Exit code 1
    means that a gate failed.

    Examples:

    \b
        lockkit verify demo-onnx --reference demo
        lockkit verify locked-onnx --reference demo --reference demo-locked \\
            --json verify.json
        lockkit verify locked-onnx --signature key.pub
        lockkit verify locked-int4 --reference demo --reference demo-locked \\
            --max-perplexity-ratio 1.1
    """
    check_json(json)
    if signed.wanted:
        _require_reference(reference, config, json)
        from lockkit.publish.sign import check_signature

        console.print(f"{export} is as it was signed, by {check_signature(export, signed)}", soft_wrap=True)
        if not reference:
            return

    from lockkit.verify.run import verify_export
    from lockkit.verify.table import failure_line, print_result

    with TerminalProgress() as progress:
        result = verify_export(export, reference or [], config, progress)
    with_tables = True
    try:
        with_tables = write_figures(json, result.record())
    finally:
        if with_tables:
            print_result(result, console)
    if not result.passed:
        raise GateFailed(failure_line(result))


def _require_reference(reference: list[str] | None, config: VerifyConfig, json: Path | None) -> None:
    """Refuse options of a comparison where only a signature is checked."""
    given = [option_of(VerifyConfig, name) for name in sorted(config.model_fields_set)] + ["--json"] * (
        json is not None
    )
    if given and not reference:
        raise UsageError(f"{given[0]} has no effect without --reference: add --reference MODEL, or leave it out")
