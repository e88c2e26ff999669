"""From rows to the figures a lock carries.

Cost to target: the least of each resource at which a run reaches the task's target; None if no
run did within the budget. Amplification: that of the lock over that of the original, each the
cheapest of all valid attacks under the same trial budget.
"""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING

from lockkit.version import git_hash, versions

if TYPE_CHECKING:
    from lockkit.attack.base import Attack
    from lockkit.attack.bench import Bench

SCHEMA = "lockkit-attack-summary/1"
CONTROL_SHARE = 0.25  # of the reference's improvement, that a gradient attack must reach on the original
WORK = ("step", "tokens", "flops", "seconds")
MEMORY = ("peak_tensor_bytes", "saved_bytes")


def cost_to_target(row: dict, target: float) -> dict[str, float] | None:
    """What the first point at or below `target` cost; peaks are the run's."""
    for point in row.get("curve", []):
        if point["loss"] <= target and point["step"] > 0:
            return {key: point[key] for key in WORK} | {key: row["cost"][key] for key in MEMORY}
    return None


def summarise(bench: Bench, rows: list[dict], attacks: list[type[Attack]]) -> dict:
    """The summary, as it is written."""
    tasks = {}
    for task in bench.tasks:
        tasks[task] = bench.tasks[task].record() | _task_figures(
            bench, [r for r in rows if r["task"] == task], rows, task
        )
    from lockkit.attack.base import registry

    unlocks = {_label(r): r["unlock"] for r in rows if r.get("unlock")}
    aware = any(attack.lock_aware for attack in attacks)
    return {
        "schema": SCHEMA,
        "first_line": "" if aware else "This audit has no attack that knows the lock: its figures say little.",
        "locked": bench.names["locked"],
        "original": bench.names["original"],
        "quality": {name: bench.quality(bench.frozen(name)).record() for name in ("original", "locked")},
        "tasks": tasks,
        "unlocks": unlocks,
        "effective_depth": _effective_depth(bench, unlocks),
        "unlock_ratio": _unlock_ratio(unlocks),
        "owner_advantage": _owner_advantage(bench, unlocks),
        "statuses": [
            {"attack": r["attack"], "model": r["model"], "task": r["task"], "status": r["status"], "note": r["note"]}
            for r in rows
        ],
        "not_tried": sorted(set(registry()) - {attack.name for attack in attacks}),
        "adversary": "has all weights of the lock, knows the method, has unlabelled text and the task's data; "
        "not the original",
        "falsified_by": "any attack that reaches the target at a lower cost than the cheapest here",
        "config": bench.config.model_dump(),
        "identity": bench.identity(),
        "versions": versions(),
        "git_hash": git_hash(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _label(row: dict) -> str:
    settings = row["config"]["unlock"]
    return " ".join([row["attack"], *(f"{key}={value}" for key, value in settings.items())])


def _task_figures(bench: Bench, rows: list[dict], everything: list[dict], task: str) -> dict:
    baseline = [r for r in rows if r["attack"] == "full-ft" and r["model"] == "original" and "best_loss" in r]
    # The target comes from the first seed's runs, as when it was set: more seeds do not move it.
    first = [r for r in baseline if r["config"]["seed"] == bench.config.seed and r["status"] == "finished"]
    start, best = first[0]["start_loss"], min(r["best_loss"] for r in first)
    target = start - bench.config.target_share * (start - best)
    required = start - CONTROL_SHARE * (start - best)
    table, valid = [], {"original": [], "locked": []}
    for name in dict.fromkeys(r["attack"] for r in rows):
        own = [r for r in rows if r["attack"] == name]
        controls = [r for r in everything if r["attack"] == name and r["model"] == "original" and "control_passed" in r]
        on_original = [r for r in own if r["model"] == "original" and "best_loss" in r]
        passed = (
            all(r["control_passed"] for r in controls)
            if controls
            else any(r["best_loss"] <= required for r in on_original)
        )
        on_locked = [r for r in own if r["model"] == "locked" and "best_loss" in r]
        table.append(
            {
                "attack": name,
                "valid": passed,
                "says": "" if passed else "attack invalid",
                "best_loss_original": min((r["best_loss"] for r in on_original), default=None),
                "best_loss_locked": min((r["best_loss"] for r in on_locked), default=None),
                "locked": _cheapest(on_locked, target),
                "original": _cheapest(on_original, target),
            }
        )
        if passed and own[0]["family"] != "control":
            valid["original"] += on_original
            valid["locked"] += on_locked
    return {
        "start_loss": start,
        "reference_loss": best,
        "target_loss": target,
        "attacks": table,
        "amplification": {key: _amplification(valid, target, key) for key in (*WORK, *MEMORY)},
    }


def _cheapest(rows: list[dict], target: float) -> dict[str, float] | None:
    costs = [cost for row in rows if (cost := cost_to_target(row, target))]
    return {key: min(cost[key] for cost in costs) for key in (*WORK, *MEMORY)} if costs else None


def _amplification(valid: dict[str, list[dict]], target: float, key: str) -> dict | None:
    found = {}
    for subject, rows in valid.items():
        costs = [(cost[key], row["attack"]) for row in rows if (cost := cost_to_target(row, target))]
        if costs:
            found[subject] = min(costs)
    if "original" not in found:
        return None
    if "locked" not in found:
        return {"value": None, "says": "> budget", "best_attack": None}
    value = found["locked"][0] / found["original"][0] if found["original"][0] else math.nan
    return {
        "value": None if math.isnan(value) else value,
        "says": f"costs {value:.2f} times as much against these attacks",
        "best_attack": found["locked"][1],
        "locked": found["locked"][0],
        "original": found["original"][0],
    }


def _effective_depth(bench: Bench, unlocks: dict[str, dict]) -> dict:
    """The fewest stages of a closed-form collapse within the stated KL; the curve beside it."""
    curve: dict[int, float] = {}
    for label, unlock in unlocks.items():
        if label.split()[0] in ("stack-solve", "linearised-stack", "partial-collapse"):
            curve[unlock["blocks"]] = min(unlock["kl_to_lock"], curve.get(unlock["blocks"], math.inf))
    limit = bench.config.effective_depth_kl
    within = [stages for stages, kl in sorted(curve.items()) if kl <= limit]
    return {
        "stages": within[0] if within else None,
        "says": str(within[0]) if within else f"more than {max(curve)}" if curve else "not measured",
        "kl_limit": limit,
        "depth": bench.depth,
        "kl_by_stages": {str(stages): kl for stages, kl in sorted(curve.items())},
    }


def _knows_weights(label: str) -> bool:
    """Whether an unlock starts from the lock's weights, and not from its inputs and outputs alone."""
    return not label.startswith("random-features") and "start=scratch" not in label and "start=features" not in label


def _scratch_curve(unlocks: dict[str, dict]) -> list[dict]:
    """Points (tokens, flops, kl_to_lock) of all re-distillations that know nothing of the lock's weights."""
    return [
        point
        for label, unlock in unlocks.items()
        if label.startswith("redistill") and not _knows_weights(label)
        for point in unlock["notes"]["curve"]
    ]


def _unlock_ratio(unlocks: dict[str, dict]) -> dict:
    """Tokens and operations of the best unlock over those of a scratch re-distillation as close to the lock.

    The best is the ordinary model closest to the lock. Where no re-distillation came as close within
    the budget, the ratio is only known to be below what it would be at the budget's end.
    """
    ordinary = {k: u for k, u in unlocks.items() if u["blocks"] == 1 and _knows_weights(k)}
    curve = _scratch_curve(unlocks)
    if not ordinary or not curve:
        return {"says": "not measured: needs a closed-form unlock and redistill"}
    label, best = min(ordinary.items(), key=lambda item: item[1]["kl_to_lock"])
    reached = [point for point in curve if point["kl_to_lock"] <= best["kl_to_lock"]]
    found = {"best_unlock": label, "kl_to_lock": best["kl_to_lock"], "reached_from_scratch": bool(reached)}
    for key in ("tokens", "flops"):
        beside = min(p[key] for p in reached) if reached else max(p[key] for p in curve)
        found[key] = best["cost"][key] / beside
    sign = "" if reached else "below "
    return found | {"says": f"{sign}{found['tokens']:.3g} in tokens, {sign}{found['flops']:.3g} in operations"}


def _owner_advantage(bench: Bench, unlocks: dict[str, dict]) -> dict:
    """Tokens of a scratch re-distillation to the lock's own fidelity, over the tokens the lock took."""
    recipe, curve = bench.record.get("recipe") or {}, _scratch_curve(unlocks)
    if not curve or "tokens" not in recipe:
        return {"says": "not measured: needs redistill, and the lock's lockkit.json"}
    own = bench.quality(bench.frozen("locked")).kl_to_original
    spent = recipe["tokens"] + recipe.get("end_to_end_tokens", 0)
    reached = [point["tokens"] for point in curve if point["kl_to_lock"] <= own]
    tokens = min(reached) if reached else max(point["tokens"] for point in curve)
    value = tokens / spent
    says = f"{'' if reached else 'more than '}{value:.3g}"
    return {"says": says, "value": value, "reached": bool(reached), "lock_tokens": spent, "kl": own}
