"""`lockkit plan`: the expected cost of a lock at each depth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

    from lockkit.lock.plan import Plan


def plan(
    model: Annotated[str, typer.Argument(help="Local folder, `.gguf` file, Hub id, or `demo`.", metavar="MODEL")],
    depth: Annotated[
        list[int] | None, typer.Option("--depth", help="Depth to show. Default: several from 8 to 128.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the expected cost of locking MODEL at each depth.

    Only the model's configuration is read. "Saved bytes" are the activations that plain autograd
    stores for the backward pass of the MLPs. An attacker can rebuild activations instead of storing
    them, and then needs no more memory than for the original: see the README.

    Examples:

    \b
        lockkit plan demo
        lockkit plan ./my-model --depth 16 --depth 48 --json
    """
    from lockkit.lock.plan import plan_model

    result = plan_model(model, depth)
    if as_json:
        typer.echo(json.dumps(result.record(), indent=2))
        return
    console.print(_table(model, result))
    console.print(
        "If the depth does not divide the MLP's width, ranks differ by one. The parameter count is the same.\n"
        "The decoding time is an estimate for one token on a CPU, not a measurement."
    )
    deepest = result.rows[-1]
    console.print(
        f"Memory needed to make a lock of depth {deepest.depth}, besides that of the libraries: about "
        f"{deepest.lock_memory_bytes / 1e9:,.1f} GB at default settings; "
        f"{deepest.lock_memory_all_layers_bytes / 1e9:,.1f} GB with phase 2 and all layers in memory "
        "(--end-to-end-tokens, --offload none)."
    )


def _table(model: str, result: Plan) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{model}: {result.model_type}, {result.parameters / 1e6:,.1f} M parameters, {result.layers} layers, "
        f"hidden {result.hidden_size}, MLP {result.intermediate_size}",
        title_justify="left",
    )
    table.add_column("depth\n(blocks\nper chain)", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("MLP\nparameters", justify="right")
    table.add_column("saved bytes\nper token", justify="right")
    table.add_column("over\noriginal", justify="right")
    table.add_column("decoding\ntime,\nexpected", justify="right")
    table.add_row(
        "original", "", f"{result.original_mlp_parameters:,}", f"{result.original_saved_bytes_per_token:,}", "1.0x", ""
    )
    for row in result.rows:
        rank = str(row.rank) if row.rank == row.smallest_rank else f"{row.smallest_rank}-{row.rank}"
        table.add_row(
            str(row.depth),
            rank,
            f"{row.mlp_parameters:,}",
            f"{row.saved_bytes_per_token:,}",
            f"{row.saved_bytes_ratio:.1f}x",
            f"{row.expected_decode_slowdown:.2f}x",
        )
    return table
