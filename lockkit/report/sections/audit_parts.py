"""What an audit says about the lock itself: what its chains are worth, unlocks, errors of layers, searches."""

from __future__ import annotations

from lockkit.attack.record import Summary
from lockkit.attack.sentences import TERMS
from lockkit.attack.target import RESOURCE_TITLES
from lockkit.attack.verdict import PRICE, lowest
from lockkit.report.attack_styles import style_of
from lockkit.report.page import MOST_LINES, Curve, LineStyle, Section, Table, made_with, number

ENDS = ("stop_loss", "most_steps", "evaluations")  # settings that say when a run is measured and ends


def unlocks(summary: Summary) -> Section | None:
    unlocks, depth = summary.unlocks, summary.effective_depth
    if not unlocks:
        return None
    section = Section("Unlocks", part=True)
    section.text.append(
        f"The lock has {depth['depth']} blocks per chain. Fewest stages of a closed-form unlock within a KL divergence of "
        f"{depth['kl_limit']} nats per token: {depth['says']}; within 5 % of the lock's perplexity: "
        f"{depth['says_within_5_percent']}."
    )
    rows = [
        [
            label, "valid" if found["valid"] else "attack invalid", str(found["blocks"]),
            number(found["perplexity"], ".3f"), number(found["kl_to_lock"], ".5f"),
            number(found["cost"]["tokens"]), giga(found["cost"]["flops"]), number(found["cost"]["seconds"], ",.1f"),
        ]
        for label, found in unlocks.items()
    ]  # fmt: skip
    head = ["unlock", "control", "blocks", "perplexity", "KL to the lock", "tokens", "GFLOP", "seconds"]
    section.tables.append(Table(head, rows))
    stages = [(float(count), kl) for count, kl in depth["kl_by_stages"].items()]
    if stages:
        level = ("limit", depth["kl_limit"])
        section.curves.append(
            Curve("Closed-form unlocks", "stages", "KL to the lock", {"best": stages}, True, True, level=level)
        )
    section.curves += _redistillation(unlocks)
    return section


def _redistillation(unlocks: dict[str, dict]) -> list[Curve]:
    """KL against tokens for all re-distillations, in the order in which they are tried. Closed-form unlocks are points."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for label, found in unlocks.items():
        curve = found["notes"].get("curve") or []
        finite = [(point["tokens"], point["kl_to_lock"]) for point in curve if point["kl_to_lock"] is not None]
        if finite:
            lines[label] = finite
    points: dict[str, list[tuple[float, float]]] = {}
    for found in unlocks.values():
        one_shot = found["blocks"] == 1 and found["valid"] and not found["notes"].get("curve")
        if one_shot and found["cost"]["tokens"] and found["kl_to_lock"] is not None:  # the axes are logarithmic
            points.setdefault(found["attack"], []).append((found["cost"]["tokens"], found["kl_to_lock"]))
    frame = [point for own in (points | lines).values() for point in own]
    styles = {label: LineStyle.of(place) for place, label in enumerate(lines)}
    styles |= {attack: style_of(attack) for attack in points}
    parts = [[*lines][start : start + MOST_LINES] for start in range(0, len(lines), MOST_LINES)]
    return [
        Curve(
            f"Re-distillation ({count} of {len(parts)})" if len(parts) > 1 else "Re-distillation",
            "tokens", "KL to the lock", {label: lines[label] for label in part} | points, True, True,
            scattered=[*points], styles=styles, frame=frame,
        )
        for count, part in enumerate(parts, 1)
    ]  # fmt: skip


def layers(summary: Summary) -> Section | None:
    layers = [(row["layer"], row["nmse"]) for row in summary.lock["layers"] if row["nmse"] is not None]
    if not layers:
        return None
    section = Section("The lock's own error", part=True)
    section.curves.append(Curve("Error of each layer's chain", "layer", "NMSE", {"NMSE": layers}, bars=True))
    return section


def searches(summary: Summary) -> Section | None:
    """The lowest loss so far against the number of trials, for lock and original."""
    by_attack: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for sweep in summary.sweeps:
        points = [(point["trial"], point["loss"]) for point in sweep["best_so_far"] if point["loss"] is not None]
        title = f"{sweep['attack']}, {sweep['task']}"
        by_attack.setdefault(title, {})[sweep["model"]] = points
    if not by_attack:
        return None
    section = Section("Searches", part=True)
    section.text.append(
        f"{summary.sweeps[0]['budget']} trials per attack and model. The curves show the lowest held-out loss so far."
    )
    section.curves = [
        Curve(title, "trial", "best loss so far", lines, dashed=["original"], styles={"locked": LineStyle.of(0)})
        for title, lines in by_attack.items()
    ]
    return section


def terms(summary: Summary) -> Section | None:
    """Three figures of a lock, each with its scale."""
    if not summary.has_chains:
        return None
    section, depth = Section("What the chains are worth", part=True), summary.effective_depth
    section.figures = [
        (f"effective depth: blocks of {depth['depth']} within KL {depth['kl_limit']}", depth["says"]),
        ("unlock ratio", summary.unlock_ratio["says"]),
        ("owner's advantage", summary.owner_advantage["says"]),
    ]
    section.text = [f"{name[0].upper()}{name[1:]}: {meaning}" for name, meaning in TERMS.items()]
    for name, found in (("unlock ratio", summary.unlock_ratio), ("owner's advantage", summary.owner_advantage)):
        if found.get("caveat"):
            section.text.append(f"Of the {name}: {found['caveat']}.")
    return section


def giga(operations: float | None) -> str:
    """Operations in GFLOP."""
    return number(operations and operations / 1e9, ",.0f")


def first_run(summary: Summary) -> list[str]:
    """What an attacker would do first: the run on the lock that is cheapest in operations, with its settings."""
    best = lowest(summary.tasks, "amplification").get(PRICE)
    runs = [run for figures in summary.tasks.values() for run in figures.runs if best and run.id == best.locked_run]
    if not runs:
        return []
    settings = runs[0].settings
    parts = (
        {"": settings}
        if "finetune" not in settings
        else {"unlock: ": settings["unlock"], "then: ": settings["finetune"]}
    )
    said = "; ".join(
        name + ", ".join(f"{key.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
                         for key, value in own.items() if value is not None and key not in ENDS)
        for name, own in parts.items()
    )  # fmt: skip
    return [
        f"An attacker would begin with the cheapest run in {RESOURCE_TITLES[PRICE]}: {runs[0].attack}, {runs[0].id} ({said}). "
        "recipe.json runs it again: lockkit attack LOCKED --original ORIGINAL --recipe recipe.json."
    ]


def facts(summary: Summary, record: dict) -> list[tuple[str, str]]:
    """How the audit was made, and the hashes of both models."""
    known = {"device": "device", "locked_sha256": "SHA-256 of the lock", "original_sha256": "SHA-256 of the original"}
    return [
        *made_with(record),
        *((title, str(summary.identity[key])) for key, title in known.items() if summary.identity.get(key)),
    ]
