"""The parts of a report, independent of its format: sections of figures, tables and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockkit.measure.records import MeasuredText


class Number(str):
    """A figure as text, as a page shows it. The JSON of a report has its value.

    Attributes:
        value: the figure; None if it is missing or not finite.
    """

    value: float | int | None

    def __new__(cls, text: str, value: float | int | None = None) -> Number:
        made = super().__new__(cls, text)
        made.value = value
        return made


class Stack(str):
    """A cell of several lines, one above the other. In the JSON of a report it is a list.

    Attributes:
        lines: texts or figures.
    """

    lines: tuple[str, ...]

    def __new__(cls, *lines: str) -> Stack:
        made = super().__new__(cls, "; ".join(lines))
        made.lines = lines
        return made


@dataclass
class Table:
    """A table. All cells are text. The first column names the row.

    Attributes:
        failed: indexes of rows that show a failure.
    """

    head: list[str]
    rows: list[list[str]]
    failed: list[int] = field(default_factory=list)


Points = Sequence[tuple[float, float]]
MOST_LINES = 9  # in one plot that can be told apart by colour, and as many markers (plot.py)


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn, by numbers: equal ones look the same in all plots.

    Attributes:
        colour, marker: from 0; after `MOST_LINES`, they repeat.
        dashes: 0 for a solid line.
    """

    colour: int
    marker: int
    dashes: int = 0

    @classmethod
    def of(cls, place: int) -> LineStyle:
        """The style of the line at a place, from 0."""
        return cls(place % MOST_LINES, place % MOST_LINES, place // MOST_LINES)


@dataclass
class Curve:
    """A plot of several lines.

    Attributes:
        title: heading of the plot.
        across, up: labels of the axes.
        lines: points (across, up) of each line, by its label.
        log, log_up: whether the axis across, or up, is logarithmic.
        bars: draw bars instead of lines.
        dashed: labels of lines to compare with, drawn without colour.
        thick: labels of lines to point out.
        scattered: labels of points that no line connects.
        level: label and value of a horizontal line.
        styles: of lines, by their labels; by default, their places decide.
        frame: points that the axes include, besides those of the lines.
    """

    title: str
    across: str
    up: str
    lines: Mapping[str, Points]
    log: bool = False
    log_up: bool = False
    bars: bool = False
    dashed: list[str] = field(default_factory=list)
    thick: list[str] = field(default_factory=list)
    scattered: list[str] = field(default_factory=list)
    level: tuple[str, float] | None = None
    styles: Mapping[str, LineStyle] = field(default_factory=dict)
    frame: Points = ()

    @property
    def drawn(self) -> bool:
        """Whether there is a point to draw."""
        return any(self.lines.values())


@dataclass
class Section:
    """One section of a report. Its parts are shown in the order of the attributes.

    Attributes:
        title: heading.
        part: whether this is a subsection of the section before it.
        about: what the result is of, in one sentence; shown before the verdict, there and at the beginning of the page.
        verdict: the result in one sentence, shown first; the page begins with those of all its sections.
        passed: whether the verdict is good or bad; None if it is neither.
        warning: shown next, highlighted.
        notes: what the reader has to do about this result; highlighted, shown with the verdicts and in the terminal, too.
        text: paragraphs.
        figures: labels and values, shown large.
        facts: labels and values of how the result was made: date, versions, machine; shown small at the end.
    """

    title: str
    part: bool = False
    about: str = ""
    verdict: str = ""
    passed: bool | None = None
    warning: str = ""
    notes: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show under the title."""
        parts = (self.about, self.verdict, self.warning, self.notes, self.text, self.figures, self.facts)
        return not (any(parts) or any(table.rows for table in self.tables) or any(c.drawn for c in self.curves))


def number(value: Any, form: str = ".4g") -> Number:
    """A figure as text; a dash if it is missing or not finite.

    Args:
        value: a number, in the unit in which it is shown, or None.
        form: format specification for floats. Integers get thousands separators.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return Number("–" if value is None or isinstance(value, float) else str(value))
    return Number(f"{value:,}" if isinstance(value, int) else format(value, form), value)


def made_with(record: dict) -> list[tuple[str, str]]:
    """The facts that results of all kinds have: date, versions, commit and machine. Missing ones are left out."""
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    machine = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in (record.get("machine") or {}).items())
    facts = {
        "date": str(record.get("created") or "").replace("T", " ")[:19],
        "versions": versions,
        "commit": record.get("git_hash") or "",
        "machine": machine,
    }
    return [(name, value) for name, value in facts.items() if value]


def measured_on(text: dict | None) -> str:
    """A sentence that names the text of perplexities and KL divergences, from its record."""
    named = MeasuredText(**text) if text else "text that this result does not name"
    return f"Perplexity and KL divergence were measured on {named}."
