"""The parts of a report, before it is HTML, Markdown or JSON: sections of figures, tables and curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lockkit.measure.records import MeasuredText


@dataclass
class Table:
    """Cells are text already; the first column names the row."""

    head: list[str]
    rows: list[list[str]]


@dataclass
class Curve:
    """Lines of points in one panel."""

    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float, float]]]
    log: bool = False  # the axis across
    log_up: bool = False
    bars: bool = False
    dashed: list[str] = field(default_factory=list)  # lines to compare with
    muted: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # lines without a legend
    level: tuple[str, float] | None = None  # a horizontal line, and what it is


@dataclass
class Section:
    """One part of a report."""

    title: str
    part: bool = False  # of the section before it
    warning: str = ""  # stands first
    text: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # label, value: shown large
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def number(value: Any, form: str = ".4g") -> str:
    """A figure as text; a dash where there is none, or it is not finite.

    Args:
        value: a number in the unit it is shown in, or None.
        form: format specification of floats; integers get thousands separators.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    return f"{value:,}" if isinstance(value, int) else format(value, form)


def measured_on(text: dict | None) -> str:
    """A sentence that names the text of perplexities and KL divergences, from its record."""
    named = MeasuredText(**text) if text else "text that this result does not name"
    return f"Perplexity and KL divergence were measured on {named}."
