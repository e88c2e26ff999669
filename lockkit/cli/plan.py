"""`lockkit plan`: the expected cost of a lock at each depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.cli.console import console, figures_table
from lockkit.cli.json_file import check_json, json_option, write_figures

if TYPE_CHECKING:
    from rich.table import Table

    from lockkit.lock.plan import Plan


def plan(
    model: Annotated[str, typer.Argument(help="Local folder, `.gguf` file, Hub id, or `demo`.", metavar="MODEL")],
    depth: Annotated[
        list[int] | None, typer.Option("--depth", help="Depth to show. Default: several from 8 to 128.")
    ] = None,
    json: Annotated[Path | None, json_option("lockkit-plan/1")] = None,
) -> None:
    """Show the expected cost of locking MODEL at each depth.

    Only sizes are read, from config.json and the heads of the weight files. What this machine computes
    per second is measured, for the time. "Saved" are the activations that plain autograd stores for
    the backward pass of the MLPs. An attacker can rebuild activations instead of storing them, and
    then needs no more memory than for the original: see docs/threat-model.md.

    Examples:

    \b
        lockkit plan demo
        lockkit plan ./my-model --depth 16 --depth 48 --json plan.json
    """
    check_json(json)
    from lockkit.lock.plan import plan_model

    result = plan_model(model, depth)
    if not write_figures(json, result.record()):
        return
    console.print(_table(model, result))
    deepest = result.rows[-1]
    console.print(
        "decode: time of a token, locked over original, on a CPU.  lock: what `lockkit lock` needs at default settings: "
        "memory besides that of the libraries, time on this machine's CPU, and space on disk. All are predictions; "
        f"measured is only this machine's speed, {result.operations_per_second / 1e9:,.0f} billion operations/s.\n"
        f"With phase 2 and all layers in memory (--end-to-end-tokens, --offload none), depth {deepest.depth} needs "
        f"{deepest.lock_memory_all_layers_bytes / 1e9:,.1f} GB.\n"
        "If the depth does not divide the MLP's width, ranks differ by one. The parameter count is always the same."
    )


def _table(model: str, result: Plan) -> Table:
    title = (
        f"{model}: {result.model_type}, {result.parameters / 1e6:,.1f} M parameters, {result.layers} layers, "
        f"hidden {result.hidden_size}, MLP {result.intermediate_size}"
    )
    heads = (
        "depth\n(blocks)",
        "rank",
        "saved\nkB/token",
        "saved /\noriginal",
        "decode /\noriginal",
        "lock:\nmemory\nGB",
        "lock:\ntime",
        "lock:\ndisk\nGB",
    )
    rows = [("original", "", f"{result.original_saved_bytes_per_token / 1e3:,.1f}", "1.0", "1.00", "", "", "")]
    for row in result.rows:
        rank = str(row.rank) if row.rank == row.smallest_rank else f"{row.smallest_rank}-{row.rank}"
        rows.append(
            (
                str(row.depth),
                rank,
                f"{row.saved_bytes_per_token / 1e3:,.1f}",
                f"{row.saved_bytes_ratio:.1f}",
                f"{row.expected_decode_slowdown:.2f}",
                f"{row.lock_memory_bytes / 1e9:,.1f}",
                _about(row.lock_seconds),
                f"{row.lock_disk_bytes / 1e9:,.2f}",
            )
        )
    return figures_table(title, heads, rows)


def _about(seconds: float) -> str:
    """A predicted time in one unit: `40 s`, `29 min`, `11 h`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
