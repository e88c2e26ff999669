"""`lockkit bench`: how fast an export runs, beside others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.bench.config import BenchConfig, Runtime
from lockkit.cli.app import app
from lockkit.cli.console import TerminalProgress, console, option
from lockkit.cli.options import config_from_options
from lockkit.export.config import Provider

if TYPE_CHECKING:
    from lockkit.bench.run import BenchResult


@app.command()
def bench(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that `lockkit export` wrote.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another export, a folder with model.onnx, or a Hugging Face model (runs in PyTorch)."),
    ] = None,
    runtimes: Annotated[list[Runtime] | None, option(BenchConfig, "runtimes", "--runtime")] = None,
    provider: Annotated[Provider | None, option(BenchConfig, "provider")] = None,
    batch_sizes: Annotated[list[int] | None, option(BenchConfig, "batch_sizes", "--batch-size")] = None,
    prompt_lengths: Annotated[list[int] | None, option(BenchConfig, "prompt_lengths", "--prompt-length")] = None,
    new_tokens: Annotated[int | None, option(BenchConfig, "new_tokens")] = None,
    rounds: Annotated[int | None, option(BenchConfig, "rounds")] = None,
    threads: Annotated[int | None, option(BenchConfig, "threads")] = None,
    kernel: Annotated[bool | None, option(BenchConfig, "kernel", "--kernel")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios there (.svg, .png, .pdf).")] = None,
) -> None:
    """Time an export, beside others: prefill, decode, time to first token, latency, memory.

    All models take turns in one run, each in a process of its own. Ratios come first: they are the
    medians of ratios within a round. Batches of several rows have prompts of equal length.

    Examples:

        lockkit bench locked-onnx --against demo-onnx --against demo

        lockkit bench locked-onnx --against demo-onnx --kernel --batch-size 1 --batch-size 8 --prompt-length 512

        lockkit bench locked-cuda --against demo-cuda --provider cuda --json bench.json --plot bench.svg
    """
    config = config_from_options(BenchConfig, locals())
    from lockkit.bench.run import bench as measure
    from lockkit.files import write_json

    with TerminalProgress() as progress:
        result = measure(export, against or [], config, progress)
    if json:
        write_json(json, result.model_dump(mode="json", by_alias=True))
    if plot:
        from lockkit.bench.plot import plot as draw

        draw(result, plot)
    _show(result)


def _show(result: BenchResult) -> None:
    from rich.table import Table

    if result.ratios:
        table = Table(title="speed of EXPORT over the other's", title_justify="left")
        for column in ("runtime", "against", "batch", "prompt", "decode", "prefill"):
            table.add_column(column, overflow="fold")
        for r in result.ratios:
            shape = str(r.batch_size), str(r.prompt_length)
            table.add_row(r.runtime, r.against, *shape, f"[bold]{r.decode:.3f}", f"[bold]{r.prefill:.3f}")
        console.print(table)
    table = Table(title="medians of the rounds", title_justify="left")
    for column in (
        "model",
        "runtime",
        "batch",
        "prompt",
        "decode tok/s",
        "prefill tok/s",
        "first ms",
        "p50 / p95 / p99 ms",
    ):
        table.add_column(column, overflow="fold")
    for m in result.measurements:
        latency = " / ".join(f"{seconds * 1e3:.1f}" for seconds in m.step_seconds.values())
        speed = f"{m.decode_tokens_per_second:.1f}", f"{m.prefill_tokens_per_second:,.0f}"
        first = f"{m.time_to_first_token_seconds * 1e3:.1f}"
        table.add_row(m.model, m.runtime, str(m.batch_size), str(m.prompt_length), *speed, first, latency)
    console.print(table)
    for m in result.models:
        console.print(
            f"{m.model} in {m.runtime}: {m.size_bytes / 1e6:,.1f} MB of files, at most "
            f"{m.peak_memory_bytes / 1e6:,.0f} MB of memory, loaded in {m.load_seconds:.1f} s",
            soft_wrap=True,
        )
