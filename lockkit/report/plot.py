"""Curves as inline SVG. Their colours are variables of the page's style, which has a light and a dark scheme."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from lockkit.report.page import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Placeholders that matplotlib writes. They are replaced by variables of the page's style (render.py: --c0, --c1, ...).
COLOURS = [f"#c0ffe{index}" for index in range(9)]
INK, MUTED = "#000000", "#c0ffee"
LEGEND_MAX = 9  # lines


def svg(curve: Curve, salt: str) -> str:
    """A curve as inline SVG. `salt` must be different for each plot of a page: it makes the ids unique."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with_legend = 1 < len(curve.lines) <= LEGEND_MAX
    lines_below = (len(curve.lines) + 1) // 2 if with_legend else 0
    figure = Figure(figsize=(4.6, 3 + 0.19 * lines_below), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    _draw(axes, curve)
    if with_legend:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axes.set_title(curve.title, fontsize=11)
    axes.set(xlabel=curve.across, ylabel=curve.up)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"lockkit-{salt}", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _inline(out.getvalue(), curve.title, salt)


def _draw(axes: Axes, curve: Curve) -> None:
    """Draw lines, level and axes."""
    from matplotlib.ticker import MaxNLocator

    for points in curve.muted.values():
        if points:
            axes.plot(*zip(*points, strict=True), color=MUTED, linewidth=0.8, alpha=0.45)
    for position, (name, points) in enumerate(curve.lines.items()):
        # A dollar sign would start a formula, and a leading underscore would hide the line.
        label = name.replace("$", r"\$").replace("_", " ")
        label = label if len(label) <= 34 else label[:33] + "…"
        across, up = zip(*points, strict=True) if points else ((), ())
        colour = COLOURS[position % len(COLOURS)]
        if curve.bars:
            axes.bar(across, up, label=label, color=colour)
        elif name in curve.dashed:
            axes.plot(across, up, linestyle="--", linewidth=1.6, color=INK, label=label)
        else:
            axes.plot(across, up, marker="o", markersize=3, linewidth=1.4, color=colour, label=label)
    if curve.level:
        name, value = curve.level
        axes.axhline(value, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    shown = [up for points in curve.lines.values() for _, up in points] + ([curve.level[1]] if curve.level else [])
    if curve.muted and shown:  # the limits of the axis depend on the other lines only
        low, high = min(shown), max(shown)
        margin = 0.06 * (high - low or abs(high) or 1)
        axes.set_ylim(low / 1.3, high * 1.3) if curve.log_up else axes.set_ylim(low - margin, high + margin)
    for chosen, axis, scale in ((curve.log, axes.xaxis, axes.set_xscale), (curve.log_up, axes.yaxis, axes.set_yscale)):
        if chosen:
            scale("log")
            _label_decades(axis)
    if not curve.log:
        locator = axes.xaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator), "matplotlib's default on a linear axis"
        locator.set_params(integer=True)


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
    text = text.replace(MUTED, "currentColor").replace(INK, "currentColor")
    # Glyphs have no colour attribute and would be black.
    text = text.replace("<svg ", '<svg role="img" fill="currentColor" ', 1)
    return text.replace(">", f"><title>{html.escape(title)}</title>", 1)
