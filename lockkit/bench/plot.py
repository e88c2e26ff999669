"""A bar chart of the ratios of a benchmark."""

from __future__ import annotations

import io
from pathlib import Path

from lockkit.bench.run import BenchResult
from lockkit.errors import UsageError, first_line
from lockkit.files import write_bytes


def picture_suffixes() -> list[str]:
    """The file name extensions that `plot` can write, such as `.svg`: the formats of matplotlib.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError("a plot needs matplotlib: pip install 'lockkit[report]', or leave out --plot") from error
    return [f".{kind}" for kind in FigureCanvasBase.filetypes]


def plot(result: BenchResult, path: Path) -> None:
    """Draw each ratio as two bars, decode and prefill, with a line at 1, and write the picture to `path`.

    Raises:
        UsageError: the result has no ratios, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    if not result.ratios:
        raise UsageError("there is nothing to compare: give --against, or leave out --plot")
    labels = [f"{r.runtime}, over {r.against}\nbatch {r.batch_size}, prompt {r.prompt_length}" for r in result.ratios]
    figure = Figure(figsize=(8, 1 + 0.6 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(labels))
    axes.barh([row + 0.2 for row in rows], [r.decode for r in result.ratios], 0.4, label="decode")
    axes.barh([row - 0.2 for row in rows], [r.prefill for r in result.ratios], 0.4, label="prefill")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(rows), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed of {result.models[0].model}, relative to the other (above 1: faster)")
    axes.legend()
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix.removeprefix("."))
        write_bytes(path, picture.getvalue())
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot write {path} ({first_line(error)}): change --plot") from error
