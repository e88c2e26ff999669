"""The results of gpu_day.py as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any


def markdown(record: dict[str, Any]) -> str:
    """The results as Markdown: the state of each part, then the figures of the finished ones."""
    found = record["parts"]
    lines = [f"# {record['machine']}", "", f"Commit {record['git_hash']}.", ""]
    lines += _table(("part", "state", "seconds", ""), ((p["name"], p["state"], p["seconds"], _why(p)) for p in found))
    by_kind = {kind: [p["figures"] for p in found if p["name"].startswith(kind) and p["figures"]] for kind in
               ("speed", "plans", "lock", "training")}  # fmt: skip
    speeds = [row for figures in by_kind["speed"] for row in figures["rows"]]
    if speeds:
        lines += [
            "",
            "Exports. `decode` and `prefill`: speed over that of the original's export; above 1, the locked one is",
        ]
        lines += [
            "faster. With 4 layers, the ratio is that of layers alone; that of the whole model is closer to 1.",
            "",
        ]
        lines += _table(tuple(speeds[0]), (row.values() for row in speeds))
    rows = [row for figures in by_kind["plans"] for row in figures["rows"]]
    if rows:
        lines += ["", "Plans of the fused operator's kernels, in microseconds for one chain:", "", *_plans(rows)]
    rows = [row for figures in by_kind["lock"] for row in figures["rows"]]
    if rows:
        lines += ["", "Speed of a lock's training, over that of a plain loop over layers:", ""]
        names = ("way", "speed_over_plain", "layer_tokens_per_second", "share_of_peak")
        lines += _table(names, ((_short(row[name]) for name in names) for row in rows))
    rows = [row for figures in by_kind["training"] for row in figures["rows"]]
    if rows:
        lines += ["", "Training through a lock, over the original under plain autograd:", ""]
        ratios = ("forward_seconds", "training_seconds", "saved_bytes", "peak_bytes")
        names = ("shape", "subject", "depth", "saver")
        lines += _table(
            (*names, *ratios),
            ([row[name] for name in names] + [_short(row["ratios"].get(name, "")) for name in ratios] for row in rows),
        )
    return "\n".join(lines) + "\n"


def _plans(rows: list[dict[str, Any]]) -> list[str]:
    """For each chain and number of tokens: the plan that the operator chooses, and the fastest of all."""
    sizes, cases = ("hidden", "depth", "bits", "tokens"), defaultdict(list)
    for row in rows:
        cases[tuple(row[name] for name in sizes)].append(row)
    lines = []
    for case, plans in cases.items():
        chosen = next((plan for plan in plans if plan["chosen"]), None)
        best = min(plans, key=lambda plan: plan["measured_us"])
        own = (_plan(chosen), chosen["expected_us"], chosen["measured_us"]) if chosen else ("not measured", "", "")
        lines.append((*case, *own, _plan(best), best["measured_us"]))
    return _table((*sizes, "chosen plan", "expected", "measured", "fastest plan", "its time"), lines)


def _plan(row: dict[str, Any]) -> str:
    return f"{row['mode']}, team {row['team']}, {row['rows']} rows"


def _why(part: dict[str, Any]) -> str:
    """The last line of a part that is not done."""
    return part["last_lines"][-1].replace("|", "/") if part["state"] != "done" and part["last_lines"] else ""


def _table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    names = list(names)
    return [
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def _short(value: object) -> object:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else value
        if isinstance(value, str)
        else f"{value:,.0f}"
    )
