"""`lockkit bench`: speed and memory of an export, compared with other models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.bench.config import BenchConfig
from lockkit.cli.console import TerminalProgress, console
from lockkit.errors import UsageError
from lockkit.files import check_output_file, readable_disk_errors, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from lockkit.bench.run import BenchResult


def bench(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder that `lockkit export` wrote.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Model to compare with: another export, a folder with model.onnx, a Hugging Face model, or a .gguf "
            "file, which runs in llama.cpp.",
        ),
    ] = None,
    *,
    config: BenchConfig,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file (schema lockkit-bench/1).")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the ratios to this file (.svg, .png, .pdf). Needs --against and matplotlib."),
    ] = None,
) -> None:
    """Measure the speed and memory of EXPORT, alone or beside others.

    Shows the speed of prefill and decoding, the time to the first token, latencies per token, and
    memory. Each model runs in a process of its own, and the models take turns. With --against, a
    table of speed ratios comes first: they are computed within each round, and the table shows their
    medians. All rows of a batch have prompts of the same length.

    Examples:

    \b
        lockkit bench locked-onnx --against demo-onnx --against demo
        lockkit bench locked-onnx --against demo-onnx --kernel \\
            --batch-size 1 --batch-size 8 --prompt-length 512
        lockkit bench locked-int4 --against original-q4_k_m.gguf --threads 4
        lockkit bench locked-cuda --against demo-cuda --provider cuda \\
            --json bench.json --plot bench.svg
    """
    if json is not None:
        check_output_file(json, "--json")
    if plot is not None:
        _check_plot(plot, against)

    from lockkit.bench.run import bench as measure

    with TerminalProgress() as progress:
        result = measure(export, against or [], config, progress)
    try:
        if json is not None:
            with readable_disk_errors(json, "--json"):
                write_json(json, result.model_dump(mode="json", by_alias=True))
        if plot is not None:
            from lockkit.bench.plot import plot as draw

            draw(result, plot)
    finally:
        _show(result)


def _check_plot(path: Path, against: list[str] | None) -> None:
    from lockkit.bench.plot import picture_suffixes

    if not against:
        raise UsageError("there is nothing to compare: give --against, or leave out --plot")
    check_output_file(path, "--plot", picture_suffixes())


def _show(result: BenchResult) -> None:
    if result.ratios:
        console.print(_ratios(result))
    console.print(_measurements(result))
    for m in result.models:
        console.print(
            f"{m.model} in {m.runtime}: {m.size_bytes / 1e6:,.1f} MB of files, at most "
            f"{m.peak_memory_bytes / 1e6:,.0f} MB of memory, loaded in {m.load_seconds:.1f} s",
            soft_wrap=True,
        )


def _ratios(result: BenchResult) -> Table:
    from rich.text import Text

    table = _table(
        "speed of EXPORT, relative to the other", "runtime", "against", "batch", "prompt", "decode", "prefill"
    )
    for r in result.ratios:
        speeds = (Text(f"{speed:.3f}", style="bold") for speed in (r.decode, r.prefill))
        table.add_row(r.runtime, r.against, str(r.batch_size), str(r.prompt_length), *speeds)
    return table


def _measurements(result: BenchResult) -> Table:
    figures = ("decode tok/s", "prefill tok/s", "first ms", "p50 / p95 / p99 ms")
    table = _table("medians over the rounds", "model", "runtime", "batch", "prompt", *figures)
    for m in result.measurements:
        latency = " / ".join(f"{seconds * 1e3:.1f}" for seconds in m.step_seconds.values())
        speed = f"{m.decode_tokens_per_second:.1f}", f"{m.prefill_tokens_per_second:,.0f}"
        first = f"{m.time_to_first_token_seconds * 1e3:.1f}"
        table.add_row(m.model, m.runtime, str(m.batch_size), str(m.prompt_length), *speed, first, latency)
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
