"""Curves as inline SVG. Their colours are variables of the page's style, which has a light and a dark scheme."""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lockkit.report.page import MOST_LINES, Curve, LineStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Placeholders that matplotlib writes. They are replaced by variables of the page's style (render.py: --c0, --c1, ...).
COLOURS = [f"#c0ffe{index}" for index in range(MOST_LINES)]
INK, PAPER = "#000000", "#c0ffef"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (6, 2, 1, 2, 1, 2)), (0, (9, 3)))
LABEL_CHARACTERS = 28  # in a line of the legend, which has two columns


def svg(curve: Curve, salt: str) -> str:
    """A curve as inline SVG. `salt` must be different for each plot of a page: it makes the ids unique."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    labels = {name: _label(name) for name in curve.lines} if len(curve.lines) > 1 else {}
    in_rows = [label.count("\n") + 1 for label in labels.values()]
    half = (len(in_rows) + 1) // 2  # the legend has two columns
    figure = Figure(figsize=(4.6, 3 + 0.19 * max(sum(in_rows[:half]), sum(in_rows[half:]))), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    _draw(axes, curve, labels)
    if labels:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=2.8)
    axes.set_title(curve.title, fontsize=11)
    axes.set(xlabel=curve.across, ylabel=curve.up)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"lockkit-{salt}", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _inline(out.getvalue(), curve.title, salt)


def _label(name: str) -> str:
    """A label as matplotlib shows it unchanged, in lines that fit in half of the plot."""
    # A dollar sign would start a formula, and a leading underscore would hide the line.
    return textwrap.fill(name.replace("$", r"\$").replace("_", " "), LABEL_CHARACTERS, break_on_hyphens=False)


def _draw(axes: Axes, curve: Curve, labels: Mapping[str, str]) -> None:
    """Draw lines, level and axes."""
    from matplotlib.ticker import MaxNLocator

    for place, (name, points) in enumerate(curve.lines.items()):
        across, up = zip(*points, strict=True) if points else ((), ())
        drawn = _line_settings(curve, name, curve.styles.get(name) or LineStyle.of(place))
        if curve.bars:
            axes.bar(across, up, label=labels.get(name), color=drawn["color"])
        else:
            axes.plot(across, up, label=labels.get(name), **drawn)
    if curve.level:
        name, value = curve.level
        axes.axhline(value, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if curve.frame:
        axes.update_datalim(curve.frame)
        axes.autoscale_view()
    for chosen, axis, scale in ((curve.log, axes.xaxis, axes.set_xscale), (curve.log_up, axes.yaxis, axes.set_yscale)):
        if chosen:
            scale("log")
            _label_decades(axis)
    if not curve.log:
        locator = axes.xaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator), "matplotlib's default on a linear axis"
        locator.set_params(integer=True)


def _line_settings(curve: Curve, name: str, style: LineStyle) -> dict[str, Any]:
    """How matplotlib draws a line: its colour and, because not everybody sees colours, its marker and dashes."""
    from matplotlib.patheffects import withStroke

    if name in curve.dashed:
        border = [withStroke(linewidth=3.2, foreground=PAPER)]  # seen where it lies on a thick line
        return {"color": INK, "linestyle": "--", "linewidth": 1.5, "path_effects": border, "zorder": 2.5}
    drawn: dict[str, Any] = {
        "color": COLOURS[style.colour % len(COLOURS)],
        "marker": MARKERS[style.marker % len(MARKERS)],
        "linestyle": "none" if name in curve.scattered else DASHES[style.dashes % len(DASHES)],
        "markersize": 6 if name in curve.scattered else 4,
        "linewidth": 1.4,
    }
    if name in curve.thick:
        drawn |= {
            "linestyle": "-",
            "linewidth": 2.4,
            "path_effects": [withStroke(linewidth=4.2, foreground=INK)],
            "zorder": 2.4,
        }
    return drawn


def _label_decades(axis: Axis) -> None:
    """Label decades; also 2 and 5 if the axis has few decades. More labels would overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    if low > 0 and high / low < 300:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _position: _short(value))
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """2,000 as 2k, so that labels do not overlap."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _inline(text: str, title: str, salt: str) -> str:
    """The `svg` element of matplotlib's file, with a title for screen readers, unique ids and the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Every plot has ids such as axes_1. On a page, ids must be unique.
    text = re.sub(r'(\bid="|="#|url\(#)', lambda match: f"{match[1]}p{salt}-", text)
    for index, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{index})")
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--page)")
    # Glyphs have no colour attribute and would be black.
    text = text.replace("<svg ", '<svg role="img" fill="currentColor" ', 1)
    return text.replace(">", f"><title>{html.escape(title)}</title>", 1)
