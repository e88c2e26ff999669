"""Time and memory against depth in a report."""

from __future__ import annotations

from pathlib import Path

from lockkit.report.page import Curve, LineStyle, Section, number
from lockkit.report.sections import reports


@reports("lockkit-asymmetry/1", place=3)
def depth_sections(record: dict, path: Path) -> list[Section]:
    """The sections from the JSON of tools/measure_asymmetry.py. The settings may be missing."""
    rows, settings = record["rows"], record.get("settings", {})
    if not rows:
        return []
    section = Section("Time and memory against depth, locked over original")
    section.text.append(
        f"Random weights, {settings.get('device', 'cpu')}, {settings.get('dtype', '')}, {number(settings.get('tokens'))} "
        f"tokens, commit {record.get('commit')}. Every figure is a ratio to the original under plain autograd."
    )
    labels = {
        "training_seconds": "forward and backward time",
        "saved_bytes": "saved bytes",
        "peak_bytes": "peak memory",
    }
    styles = {saver: LineStyle.of(place) for place, saver in enumerate(dict.fromkeys(row["saver"] for row in rows))}
    for shape, subject in dict.fromkeys((row["shape"], row["subject"]) for row in rows):
        for metric, label in labels.items():
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                ratio = (row.get("ratios") or {}).get(metric)
                if (row["shape"], row["subject"]) == (shape, subject) and row["depth"] and ratio:
                    lines.setdefault(row["saver"], []).append((row["depth"], ratio))
            section.curves.append(
                Curve(
                    f"{shape}, {subject}: {label}",
                    "depth",
                    "locked / original",
                    lines,
                    level=("original", 1.0),
                    styles=styles,
                )
            )
    return [section]
