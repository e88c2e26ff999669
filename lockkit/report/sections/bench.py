"""A benchmark in a report: ratios, speeds, latencies, sizes."""

from __future__ import annotations

import statistics
from pathlib import Path

from lockkit.report.page import Curve, Section, Table, made_with, number
from lockkit.report.sections import reports


@reports("lockkit-bench/1", place=4)
def bench_sections(record: dict, path: Path) -> list[Section]:
    """The section from the JSON of `lockkit bench`. Entries that describe how it was measured may be missing.

    Raises:
        KeyError, ValueError: there are no measurements.
    """
    models, ratios = record["models"], record["ratios"]
    if not models or not record["measurements"]:
        raise ValueError("no models, or no measurements")
    name = str(models[0]["model"])
    section = Section(f"Benchmark of {name}", verdict=_verdict(name, record))
    section.text.append(
        "Medians over the rounds. Each model runs in a process of its own, and the models take turns. A ratio is computed "
        "within each round; above 1, the export is faster."
    )
    section.tables = [_ratios(ratios), _speeds(record), _sizes(models)]
    if ratios:
        labels = [f"{one['against']}, {one['runtime']}" for one in ratios]
        lines = {
            kind: [(float(place), one[kind]) for place, one in enumerate(ratios, 1)] for kind in ("decode", "prefill")
        }
        section.text.append("In the plot, from left to right: " + "; ".join(dict.fromkeys(labels)) + ".")
        section.curves.append(
            Curve(f"Speed of {name} over the others", "row of the first table", "ratio", lines, level=("equal", 1.0))
        )
    section.facts = [*made_with(record), *_settings(record.get("config", {}))]
    return [section]


def _verdict(name: str, record: dict) -> str:
    ratios = record["ratios"]
    if not ratios:
        count = len(record["models"])
        return f"{name} was measured alone." if count < 2 else f"{count} models were measured, and none was compared."
    parts = []
    for other in dict.fromkeys(ratio["against"] for ratio in ratios):
        own = [ratio for ratio in ratios if ratio["against"] == other]
        decode, prefill = (statistics.median(ratio[kind] for ratio in own) for kind in ("decode", "prefill"))
        parts.append(f"{decode:.2f} times the decoding speed and {prefill:.2f} times the prefill speed of {other}")
    over = " (median over runtimes and shapes)" if len(ratios) > len(parts) else ""
    return f"{name} has {'; '.join(parts)}{over}."


def _ratios(ratios: list[dict]) -> Table:
    rows = [
        [
            ratio["against"],
            ratio["runtime"],
            number(ratio["batch_size"]),
            number(ratio["prompt_length"]),
            number(ratio["decode"], ".3f"),
            number(ratio["prefill"], ".3f"),
        ]
        for ratio in ratios
    ]
    return Table(["against", "runtime", "batch", "prompt, tokens", "decode, ratio", "prefill, ratio"], rows)


def _speeds(record: dict) -> Table:
    measurements = record["measurements"]
    names = list(measurements[0]["step_seconds"])
    rows = [
        [
            one["model"],
            one["runtime"],
            number(one["batch_size"]),
            number(one["prompt_length"]),
            number(one["decode_tokens_per_second"], ",.1f"),
            number(one["prefill_tokens_per_second"], ",.0f"),
            number(one["time_to_first_token_seconds"] * 1e3, ",.1f"),
            *(number(seconds * 1e3, ",.1f") for seconds in one["step_seconds"].values()),
        ]
        for one in measurements
    ]
    head = ["model", "runtime", "batch", "prompt, tokens", "decode, tok/s", "prefill, tok/s", "first token, ms"]
    return Table([*head, *(f"next token {name}, ms" for name in names)], rows)


def _sizes(models: list[dict]) -> Table:
    rows = [
        [
            one["model"],
            one["runtime"] + (", kernel" if one.get("kernel") else ""),
            str(one.get("precision") or "–"),
            number(one["size_bytes"] / 1e6, ",.1f"),
            number(one["peak_memory_bytes"] / 1e6, ",.0f"),
            number(one["load_seconds"], ".1f"),
        ]
        for one in models
    ]
    return Table(["model", "runtime", "precision", "files, MB", "peak memory, MB", "load, s"], rows)


def _settings(config: dict) -> list[tuple[str, str]]:
    shown = ", ".join(
        f"{name.replace('_', ' ')}: {value}" for name, value in config.items() if value not in (None, False)
    )
    return [("settings", shown)] if shown else []
