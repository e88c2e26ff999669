"""What a report says, before it is HTML, Markdown or JSON: sections of figures, tables and curves.

Results are recognised by their `schema`: `lockkit-lock/2` (lockkit.json), `lockkit-verify/1`,
`lockkit-attack-summary/2` (an audit, with rows.jsonl beside it; see audit.py), and
`lockkit-asymmetry/1` (tools/measure_asymmetry.py). What is missing is left out, or said.
"""

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
    """A figure as text; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    return f"{value:,}" if isinstance(value, int) else format(value, form)


def measured_on(text: dict | None) -> str:
    """A sentence that names the text of perplexities and KL divergences, from its record."""
    named = MeasuredText(**text) if text else "text that this result does not name"
    return f"Perplexity and KL divergence were measured on {named}."


def sections(results: list[dict]) -> list[Section]:
    """All sections, audits first: they are what a reader must know."""
    from lockkit.report.audit import audit_sections

    found = []
    kinds = {
        "attack-summary": audit_sections,
        "lock": lambda record: [lock_section(record)],
        "verify": lambda record: [verify_section(record)],
        "asymmetry": lambda record: [depth_section(record)],
    }
    for kind, build in kinds.items():
        for result in results:
            if result["schema"].startswith(f"lockkit-{kind}/"):
                found += build(result)
    return found


def lock_section(record: dict) -> Section:
    """From `lockkit.json`."""
    fidelity, dlr, layers = record.get("fidelity", {}), record.get("dlr", {}), record.get("layers", [])
    section = Section(f"Lock of {record.get('model', 'a model')}")
    section.figures = [
        ("perplexity, locked over original", number(fidelity.get("perplexity_ratio"), ".4f")),
        ("perplexity, locked", number(fidelity.get("perplexity"), ".3f")),
        ("perplexity, original", number(fidelity.get("original_perplexity"), ".3f")),
        ("KL to the original, nats per token", number(fidelity.get("kl_divergence"), ".5f")),
        ("same most likely token", number(fidelity.get("top1_agreement"), ".2%")),
        ("depth", number(dlr.get("depth"))),
    ]
    data = record.get("data", {})
    section.text.append(
        f"Distilled on {data.get('source', 'unknown text')} ({number(data.get('train_tokens'))} tokens); "
        f"{number(record.get('seconds'), '.0f')} seconds. {measured_on(fidelity.get('text'))}"
    )
    rows = [
        [str(layer["layer"]), number(layer.get("nmse"), ".5f"), number(layer.get("gain"), ".4g")] for layer in layers
    ]
    section.tables.append(Table(["layer", "NMSE after phase 1", "gain"], rows))
    points = [(layer["layer"], layer["nmse"]) for layer in layers if isinstance(layer.get("nmse"), int | float)]
    section.curves.append(Curve("Error of each layer's chain", "layer", "NMSE", {"NMSE": points}, bars=True))
    return section


def verify_section(record: dict) -> Section:
    """From the JSON of `lockkit verify`."""
    name = str(record.get("export", "an export")).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    passed = record.get("passed")
    ratios = record.get("perplexity", {})
    section = Section(f"Verification of {name}: {'passed' if passed else 'FAILED'}")
    section.figures = [
        ("precision", str(record.get("precision", "–"))),
        ("perplexity, ONNX over original", number(ratios.get("onnx_over_original"), ".4f")),
        ("perplexity, ONNX over locked", number(ratios.get("onnx_over_locked"), ".4f")),
    ]
    section.text.append(measured_on(record.get("text")))
    section.tables.append(
        Table(
            ["way of running", "tokens", "KL, nats", "same top-1", "largest difference"],
            [
                [
                    row["mode"],
                    number(row["tokens"]),
                    number(row["kl_divergence"], ".2e"),
                    number(row["top1_agreement"], ".2%"),
                    number(row["max_difference"], ".2e"),
                ]
                for row in record.get("parity", [])
            ],
        )
    )
    section.tables.append(
        Table(
            ["gate", "figure", "value", "limit", "outcome"],
            [
                [
                    row["gate"],
                    row["figure"],
                    number(row["value"]),
                    number(row["limit"]),
                    "passed" if row["passed"] else "FAILED",
                ]
                for row in record.get("gates", [])
            ],
        )
    )
    return section


def depth_section(record: dict) -> Section:
    """From tools/measure_asymmetry.py: time and memory against depth."""
    rows, settings = record.get("rows", []), record.get("settings", {})
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
    for shape, subject in dict.fromkeys((row["shape"], row["subject"]) for row in rows):
        for metric, label in labels.items():
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                ratio = (row.get("ratios") or {}).get(metric)
                if (row["shape"], row["subject"]) == (shape, subject) and row["depth"] and ratio:
                    lines.setdefault(row["saver"], []).append((row["depth"], ratio))
            section.curves.append(Curve(f"{shape}, {subject}: {label}", "depth", "locked over original", lines))
    return section
