"""What a report says, before it is HTML, Markdown or JSON: sections of figures, tables and curves.

Results are recognised by their `schema`: `lockkit-lock/2` (lockkit.json), `lockkit-verify/1`, and
`lockkit-attack/1` (a summary; its rows are JSON lines in the file it names as `rows`, or in rows.jsonl
beside it), and `lockkit-asymmetry/1` (tools/measure_asymmetry.py).

An attack's row: `attack`, `model` (original, locked, ...), `task`, `seed`, `valid` (its positive control
held) or `reason`, the final `loss`, its costs `tokens`, `flops`, `seconds`, `peak_memory_bytes`,
`amplification` by resource, and `curve`, points of `loss` against the same resources. A summary:
`headline` by resource (attack, amplification), `quality`, `effective_depth`, `unlock_ratio`,
`owners_advantage`, `adversary`, `budget`, `not_tried`, `falsified_by`. What is missing is left out, or said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

RESOURCES = {
    "tokens": "tokens",
    "flops": "floating-point operations",
    "seconds": "seconds",
    "peak_memory_bytes": "peak memory, bytes",
}


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
    log: bool = False
    bars: bool = False


@dataclass
class Section:
    """One part of a report."""

    title: str
    text: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # label, value: shown large
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def number(value: Any, form: str = ".4g") -> str:
    """A figure as text; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    return f"{value:,}" if isinstance(value, int) else format(value, form)


def times(value: Any) -> str:
    return "target not reached: > budget" if value is None else f"costs {number(value, '.3g')} times as much"


def sections(results: list[dict]) -> list[Section]:
    """All sections, attacks first: they are what a reader must know."""
    found = []
    kinds = {"attack": attack_section, "lock": lock_section, "verify": verify_section, "asymmetry": depth_section}
    for kind, build in kinds.items():
        found += [build(result) for result in results if result["schema"].startswith(f"lockkit-{kind}/")]
    return found


def lock_section(record: dict) -> Section:
    """From `lockkit.json`."""
    fidelity, dlr, layers = record.get("fidelity", {}), record.get("dlr", {}), record.get("layers", [])
    section = Section(f"Lock of {record.get('model', 'a model')}")
    section.figures = [
        ("perplexity, locked over original", number(fidelity.get("perplexity_ratio"), ".4f")),
        ("perplexity, locked", number(fidelity.get("perplexity"), ".3f")),
        ("perplexity, original", number(fidelity.get("original_perplexity"), ".3f")),
        ("KL to the original, nats a token", number(fidelity.get("kl_divergence"), ".5f")),
        ("same most likely token", number(fidelity.get("top1_agreement"), ".2%")),
        ("depth", number(dlr.get("depth"))),
    ]
    data = record.get("data", {})
    section.text.append(
        f"Distilled on {data.get('source', 'unknown text')} ({number(data.get('train_tokens'))} tokens) and measured on "
        f"{number(data.get('evaluation_tokens'))} others; {number(record.get('seconds'), '.0f')} seconds."
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


def attack_section(summary: dict) -> Section:
    """From an audit's summary, with its rows under `rows`."""
    rows = [row for row in summary.get("rows", []) if isinstance(row, dict)]
    section = Section(f"Audit of {summary.get('model', 'a locked model')}")
    headline, quality = summary.get("headline") or {}, summary.get("quality") or {}
    if not headline:
        section.text.append(
            "No valid attack has a measured amplification: nothing is known of what this lock is worth."
        )
    for resource, best in headline.items():
        label = f"{RESOURCES.get(resource, resource)}, against the best of these attacks ({best.get('attack', '–')})"
        section.figures.append((label, times(best.get("amplification"))))
    section.figures += [
        ("perplexity, locked over original", number(quality.get("perplexity_ratio"), ".4f")),
        ("effective depth", number(summary.get("effective_depth"))),
        ("unlock ratio (1 is ideal for the owner)", number(summary.get("unlock_ratio"), ".3g")),
        ("owner's advantage", number(summary.get("owners_advantage"), ".3g")),
    ]
    section.text.append(
        "A locked model costs this many times as much against these attacks; nothing is said of attacks that were "
        "not tried, and where the original weights are public a lock adds nothing."
    )
    for label in ("adversary", "budget", "falsified_by"):
        if summary.get(label):
            section.text.append(f"{label.replace('_', ' ').capitalize()}: {summary[label]}")
    untried = summary.get("not_tried") or []
    section.text.append("Not tried: " + ("; ".join(map(str, untried)) if untried else "the results do not say."))
    section.tables.append(_attack_table(rows))
    section.curves += _attack_curves(rows)
    return section


def _attack_table(rows: list[dict]) -> Table:
    head = ["attack", "model", "task", "seed", "control", "loss", "tokens", "FLOPs", "seconds", "peak memory"]
    cells = []
    for row in rows:
        control = {True: "valid", False: "attack invalid", None: "–"}[row.get("valid")]
        cells.append(
            [str(row.get(name, "–")) for name in ("attack", "model", "task", "seed")]
            + [f"{control}: {row['reason']}" if row.get("reason") else control]
            + [number(row.get("loss")), number(row.get("tokens")), number(row.get("flops"), ".2e")]
            + [number(row.get("seconds"), ".1f"), number(row.get("peak_memory_bytes"), ".2e")]
        )
    return Table(head, cells)


def _attack_curves(rows: list[dict]) -> list[Curve]:
    curves = []
    for resource in ("tokens", "flops", "seconds"):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            points = [
                (point[resource], point["loss"])
                for point in row.get("curve") or []
                if point.get(resource) and point.get("loss") is not None
            ]
            if points:
                name = " ".join(str(row[part]) for part in ("attack", "model", "task", "seed") if part in row)
                lines[name] = points
        if lines:
            curves.append(Curve(f"Held-out loss against {RESOURCES[resource]}", resource, "loss", lines, log=True))
    best: dict[str, list[tuple[float, float]]] = {}
    for row in rows:  # in the order of trials; losses of two tasks cannot be compared
        if _finite(row.get("loss")):
            points = best.setdefault(" ".join(str(row[part]) for part in ("model", "task") if part in row), [])
            points.append((len(points) + 1, min([row["loss"], *[loss for _, loss in points]])))
    best = {name: points for name, points in best.items() if len(points) > 1}
    if best:
        curves.append(Curve("Best loss so far", "trial", "loss", best))
    return curves


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
