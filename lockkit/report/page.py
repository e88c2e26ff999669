"""The parts of a report, independent of its format: sections of figures, tables and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockkit.measure.records import MeasuredText


@dataclass
class Table:
    """A table. All cells are text. The first column names the row."""

    head: list[str]
    rows: list[list[str]]


Points = Sequence[tuple[float, float]]


@dataclass
class Curve:
    """A plot of several lines.

    Attributes:
        title: heading of the plot.
        across, up: labels of the axes.
        lines: points (across, up) of each line, by its label.
        log, log_up: whether the axis across, or up, is logarithmic.
        bars: draw bars instead of lines.
        dashed: labels of lines to compare with.
        muted: further lines, drawn in grey without a label.
        level: label and value of a horizontal line.
    """

    title: str
    across: str
    up: str
    lines: Mapping[str, Points]
    log: bool = False
    log_up: bool = False
    bars: bool = False
    dashed: list[str] = field(default_factory=list)
    muted: Mapping[str, Points] = field(default_factory=dict)
    level: tuple[str, float] | None = None


@dataclass
class Section:
    """One section of a report. Its parts are shown in the order of the attributes.

    Attributes:
        title: heading.
        part: whether this is a subsection of the section before it.
        warning: shown first, highlighted.
        text: paragraphs.
        figures: labels and values, shown large.
    """

    title: str
    part: bool = False
    warning: str = ""
    text: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def number(value: Any, form: str = ".4g") -> str:
    """A figure as text; a dash if it is missing or not finite.

    Args:
        value: a number, in the unit in which it is shown, or None.
        form: format specification for floats. Integers get thousands separators.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    return f"{value:,}" if isinstance(value, int) else format(value, form)


def measured_on(text: dict | None) -> str:
    """A sentence that names the text of perplexities and KL divergences, from its record."""
    named = MeasuredText(**text) if text else "text that this result does not name"
    return f"Perplexity and KL divergence were measured on {named}."
