"""`lockkit bench`: speed and memory of an export, compared with other models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.bench.config import BenchConfig
from lockkit.cli.console import TerminalProgress, console, figures_table
from lockkit.cli.json_file import check_json, json_option, write_figures
from lockkit.errors import UsageError
from lockkit.files import check_output_file

if TYPE_CHECKING:
    from rich.table import Table

    from lockkit.bench.run import BenchResult, Measurement


def bench(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder that `lockkit export` wrote.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Model to compare with: another export; a folder with model.onnx; a Hugging Face model, which runs in "
            "PyTorch; or a .gguf file, which runs in llama.cpp.",
        ),
    ] = None,
    *,
    config: BenchConfig,
    json: Annotated[Path | None, json_option("lockkit-bench/1")] = None,
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
    check_json(json)
    if plot is not None:
        _check_plot(plot, against)

    from lockkit.bench.run import bench as measure

    with TerminalProgress() as progress:
        result = measure(export, against or [], config, progress)
    with_tables = True
    try:
        with_tables = write_figures(json, result.model_dump(mode="json", by_alias=True))
        if plot is not None:
            from lockkit.bench.plot import plot as draw

            draw(result, plot)
    finally:
        if with_tables:
            _show(result)


def _check_plot(path: Path, against: list[str] | None) -> None:
    from lockkit.bench.plot import picture_suffixes

    if not against:
        raise UsageError("there is nothing to compare: give --against, or leave out --plot")
    check_output_file(path, "--plot", picture_suffixes())


def _show(result: BenchResult) -> None:
    if result.ratios:
        console.print(_ratios(result))
    for table in (_speeds(result), _latencies(result), _sizes(result)):
        console.print(table)
    if fused := [f"{model.model} in {model.runtime}" for model in result.models if model.kernel]:
        console.print(f"with the fused operator: {', '.join(fused)}")
    for word, wanted in (("each step one CUDA graph", True), ("no CUDA graphs", False)):
        if found := [f"{model.model} in {model.runtime}" for model in result.models if model.cuda_graphs is wanted]:
            console.print(f"{word}: {', '.join(found)}")


def _ratios(result: BenchResult) -> Table:
    rows = [
        (r.against, r.runtime, f"{r.batch_size}", f"{r.prompt_length:,}", f"{r.decode:.3f}", f"{r.prefill:.3f}")
        for r in result.ratios
    ]
    heads = ("against", "runtime", "batch", "prompt\ntokens", "decode\nratio", "prefill\nratio")
    return figures_table("speed of EXPORT over that of the other model; above 1, EXPORT is faster", heads, rows)


def _speeds(result: BenchResult) -> Table:
    rows = [
        (*_shape(m), f"{m.decode_tokens_per_second:,.1f}", f"{m.prefill_tokens_per_second:,.0f}")
        for m in result.measurements
    ]
    return figures_table("speed, medians over the rounds", (*_SHAPE, "decode\ntok/s", "prefill\ntok/s"), rows)


def _latencies(result: BenchResult) -> Table:
    names = list(result.measurements[0].step_seconds) if result.measurements else []
    rows = [
        (*_shape(m), *(f"{s * 1e3:,.1f}" for s in (m.time_to_first_token_seconds, *m.step_seconds.values())))
        for m in result.measurements
    ]
    heads = (*_SHAPE, "first\ntoken\nms", *(f"next\n{name}\nms" for name in names))
    return figures_table("time to a token, medians and percentiles", heads, rows)


def _sizes(result: BenchResult) -> Table:
    rows = [
        (m.model, m.runtime, f"{m.size_bytes / 1e6:,.1f}", f"{m.peak_memory_bytes / 1e6:,.0f}", f"{m.load_seconds:.1f}")
        for m in result.models
    ]
    return figures_table("size", ("model", "runtime", "files\nMB", "peak\nmemory\nMB", "load\ns"), rows)


_SHAPE = ("model", "runtime", "batch", "prompt\ntokens")


def _shape(m: Measurement) -> tuple[str, str, str, str]:
    return m.model, m.runtime, f"{m.batch_size}", f"{m.prompt_length:,}"
