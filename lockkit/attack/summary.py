"""The summary of an audit: from rows to the figures of a lock.

- Cost to target, and which runs are valid: target.py.
- *Amplification*: the cost to target on the lock over that on the original. Each is the lowest of all valid attacks,
  which have the same number of trials on both.
- *Attention-only bound*: the cost of fine-tuning everything but the chains (attack `frozen-dlr`) on the lock,
  over the cheapest attack on the original. It bounds the amplification of every lock of this shape: as long as
  the chains compute the same function, their weights cannot make this attack more expensive.
- Effective depth, unlock ratio and owner's advantage: unlock_figures.py.
"""

from __future__ import annotations

import datetime
import statistics
from typing import TYPE_CHECKING

from lockkit.attack.registry import gradient_attack, registry
from lockkit.attack.selection import BASELINE, SUBJECTS
from lockkit.attack.target import (
    MEMORY,
    NOT_FINITE,
    RESOURCES,
    WORK,
    Target,
    cheapest,
    control_passed,
    cost_to_target,
    ratio,
    reference_target,
    run_name,
    runs_of,
    seed_of,
    unlock_control,
    valid_runs,
    without_seed,
)
from lockkit.attack.unlock_figures import (
    effective_depth,
    owner_advantage,
    perplexity_limit,
    unlock_ratio,
    unlocks_of,
)
from lockkit.version import git_hash, versions

if TYPE_CHECKING:
    from lockkit.attack.base import Attack
    from lockkit.attack.bench import Bench

SCHEMA = "lockkit-attack-summary/2"
ATTENTION_ONLY = "frozen-dlr"
NO_LOCK_AWARE = "This audit has no attack that uses knowledge of the lock: its figures say little."
ADVERSARY = "knows the method; has all weights of the lock, unlabelled text and the data of the task; does not have the original"
FALSIFIED_BY = "any attack that reaches a target at a lower cost than the cheapest attack of this audit"


def summarise(bench: Bench, rows: list[dict], attacks: list[type[Attack]], sweeps: list[dict]) -> dict:
    """The summary of an audit. It may contain numbers that are not finite.

    Args:
        rows: all rows of this audit.
        attacks: the attacks that were chosen.
        sweeps: the records of its searches (sweep.py).
    """
    unlocks = unlocks_of(rows)
    quality = {subject: bench.quality_of(subject).record() for subject in SUBJECTS}
    return {
        "schema": SCHEMA,
        "first_line": "" if any(attack.lock_aware for attack in attacks) else NO_LOCK_AWARE,
        "locked": bench.names["locked"],
        "original": bench.names["original"],
        "quality": quality | {"perplexity_ratio": bench.fidelity.perplexity_ratio, "fidelity": bench.fidelity.record()},
        "lock": _lock(bench),
        "tasks": {task: bench.tasks[task].record() | _task_figures(bench, rows, task) for task in bench.tasks},
        "unlocks": unlocks,
        "effective_depth": effective_depth(bench, unlocks),
        "unlock_ratio": unlock_ratio(unlocks, bench.config.effective_depth_kl, perplexity_limit(bench)),
        "owner_advantage": owner_advantage(bench.lock_tokens, unlocks, quality["locked"]["kl_to_original"]),
        "sweeps": [sweep | {"best_so_far": _best_so_far(sweep["trials"])} for sweep in sweeps],
        "probes": [_probe(row) for row in rows if row["model"] == "locked" and row["task"] is None],
        "runs": _runs(rows),
        "row_keys": [row["key"] for row in rows],
        "not_tried": _not_tried(rows, attacks),
        "adversary": ADVERSARY,
        "budget": _budget(bench),
        "falsified_by": FALSIFIED_BY,
        "config": bench.config.model_dump(),
        "identity": bench.identity(),
        "versions": versions(),
        "git_hash": git_hash(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _lock(bench: Bench) -> dict:
    recipe = bench.record.get("recipe") or {}
    return {
        "depth": bench.depth,
        "init": recipe.get("init"),
        "coupling": recipe.get("coupling"),
        "layers": [{"layer": r["layer"], "nmse": r.get("nmse")} for r in bench.record.get("layers") or []],
    }


def _budget(bench: Bench) -> str:
    config = bench.config
    searched = f", and {config.sweep} trials of a search per attack" if config.sweep else ""
    return (
        f"{config.steps} steps per run, each of {config.batch_rows} rows of {config.block_tokens} tokens, "
        f"learning rates {', '.join(map(str, config.learning_rates))}{searched}, the same for lock and original; "
        f"{config.unlock_tokens:,} unlabelled tokens for closed-form unlocks, {config.redistill_tokens:,} for a re-distillation"
    )


def _probe(row: dict) -> dict:
    """The row of a probe without the entries that all rows have."""
    common = ("schema", "key", "family", "lock_aware", "model", "task", "reused")
    return {key: value for key, value in row.items() if key not in common}


def _runs(rows: list[dict]) -> dict:
    """The number of rows by status, and the rows that did not finish."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    keep = ("attack", "model", "task", "status", "note")
    not_finished = [{key: row[key] for key in keep} for row in rows if row["status"] != "finished"]
    reused = sum(row["reused"] for row in rows)
    return {"rows": len(rows), "reused_from_controls": reused, "by_status": counts, "not_finished": not_finished}


def _not_tried(rows: list[dict], attacks: list[type[Attack]]) -> list[str]:
    """The attacks that were not chosen, and with a reason those that could not run at all."""
    left_out = sorted(set(registry()) - {attack.name for attack in attacks})
    for attack in attacks:
        own = [row for row in rows if row["attack"] == attack.name]
        if own and all(row["status"] in ("unavailable", "failed", "out-of-memory") for row in own):
            left_out.append(f"{attack.name} ({own[0]['note']})")
    return left_out


def _best_so_far(trials: list[dict]) -> list[dict]:
    """The lowest loss and the lowest value after each trial, in order. Trials without a loss are counted."""
    best: dict[str, float | None] = {"value": None, "loss": None}
    found: list[dict] = []
    for trial in sorted(trials, key=lambda trial: trial["number"]):
        for key in best:
            known = [value for value in (best[key], trial[key]) if value is not None]
            best[key] = min(known, default=None)
        found.append({"trial": trial["number"] + 1, **best})
    return found


def _task_figures(bench: Bench, rows: list[dict], task: str) -> dict:
    config = bench.config
    references = [
        row
        for row in runs_of(rows, task)
        # Only the suite's own trials, as when the target was set: more seeds and searches do not change it.
        if row["attack"] == BASELINE and row["model"] == "original" and _in_grid(row, bench)
    ]
    target = reference_target(references, config.target_share)
    assert target is not None, "an audit ends if a task has no target"
    valid = valid_runs(rows, task, target)
    return {
        "start_loss": target.start,
        "reference_loss": target.best,
        "target_loss": target.loss,
        "attacks": _attack_table(rows, task, target),
        "amplification": {key: _amplification(valid, target, key, config.seed) for key in ("step", *RESOURCES)},
        "attention_only_bound": {key: _attention_only(valid, target, key) for key in RESOURCES},
    }


def _in_grid(row: dict, bench: Bench) -> bool:
    return row["config"] in [config.model_dump() for config in gradient_attack(BASELINE).trials(bench.config)]


def _attack_table(rows: list[dict], task: str, target: Target) -> list[dict]:
    """One entry per attack: control, best losses, lowest costs to the target."""
    table = []
    runs = runs_of(rows, task)
    for name in dict.fromkeys(run_name(row) for row in rows if row["task"] == task or _control_did_not_run(row)):
        own = {subject: [r for r in runs if run_name(r) == name and r["model"] == subject] for subject in SUBJECTS}
        passed = [control_passed(row, rows, target) for row in own["original"] + own["locked"]]
        counted = [row for row in own["locked"] if control_passed(row, rows, target)] or own["locked"]
        valid = any(passed)
        ended = {row["status"]: row["note"] for row in rows if run_name(row) == name and row["task"] in (task, None)}
        says = "" if valid else "attack invalid" if passed else "; ".join(note or s for s, note in ended.items())
        control = next((unlock_control(row, rows) for row in counted if "unlock" in row["config"]), None)
        table.append(
            {
                "attack": name,
                "family": next(row["family"] for row in rows if run_name(row) == name),
                "valid": valid,
                "says": says,
                "trials_original": len(own["original"]),
                "trials_locked": len(own["locked"]),
                "control_won_back": control and control.get("won_back"),
                "best_loss_original": min((r["best_loss"] for r in own["original"]), default=None),
                "best_loss_locked": min((r["best_loss"] for r in counted), default=None),
                "original": _least(own["original"], target.loss),
                "locked": _least(counted, target.loss),
            }
        )
    return table


def _control_did_not_run(row: dict) -> bool:
    """Whether this is a control of an unlock that did not finish, so that the unlock did not run on the lock."""
    return row["model"] == "original" and row["task"] is None and row["status"] != "finished"


def _least(rows: list[dict], target: float) -> dict[str, float | None] | None:
    """The lowest cost in each resource at which any of `rows` reached the target; None if none did."""
    costs = [cost for row in rows if (cost := cost_to_target(row, target))]

    def least(key: str) -> float | None:
        return min((value for cost in costs if (value := cost[key]) is not None), default=None)

    return {key: least(key) for key in (*WORK, *MEMORY)} if costs else None


def _amplification(valid: list[dict], target: Target, resource: str, first_seed: int) -> dict | None:
    """The cheapest attack on the lock over the cheapest on the original, with its spread over seeds."""
    own = {subject: [row for row in valid if row["model"] == subject] for subject in SUBJECTS}
    best = {subject: cheapest(own[subject], target.loss, resource) for subject in SUBJECTS}
    if best["original"] is None:
        return None
    original, base = best["original"]
    if best["locked"] is None:
        return {
            "value": None, "says": _not_reached(own["locked"], target), "best_attack": None, "original": original,
            "best_attack_original": base["attack"],
        }  # fmt: skip
    locked, row = best["locked"]
    value = ratio(locked, original)
    return {
        "value": value,
        "says": NOT_FINITE if value is None else f"costs {value:.2f} times as much against these attacks",
        "best_attack": run_name(row),
        "best_attack_original": base["attack"],
        "locked": locked,
        "original": original,
        "seeds": _over_seeds(valid, target, resource, first_seed),
    }


def _not_reached(rows: list[dict], target: Target) -> str:
    """Why there is no cost to target: no run reached it, or the cost of those that did was not counted."""
    return NOT_FINITE if any(cost_to_target(row, target.loss) for row in rows) else "target not reached: > budget"


def _attention_only(valid: list[dict], target: Target, resource: str) -> dict | None:
    """The attention-only bound, see the top of this file.

    `value_on_original` is the same figure with the attention-only fine-tune of the original in place of the lock's.
    """
    best = cheapest([row for row in valid if row["model"] == "original"], target.loss, resource)
    if best is None:
        return None
    base, row = best
    own = {s: [r for r in valid if r["attack"] == ATTENTION_ONLY and r["model"] == s] for s in SUBJECTS}
    found = {subject: cheapest(own[subject], target.loss, resource) for subject in SUBJECTS}
    values = {subject: cost and ratio(cost[0], base) for subject, cost in found.items()}
    if not own["locked"]:
        says = f"not measured: needs the attack {ATTENTION_ONLY}"
    elif found["locked"] is None:
        says = _not_reached(own["locked"], target)
    elif values["locked"] is None:
        says = NOT_FINITE
    else:
        says = f"at most {values['locked']:.2f} times as much"
    return {
        "value": values["locked"],
        "says": says,
        "value_on_original": values["original"],
        "locked": found["locked"] and found["locked"][0],
        "original": base,
        "best_attack_original": row["attack"],
    }


def _over_seeds(valid: list[dict], target: Target, resource: str, first_seed: int) -> dict | None:
    """The ratio over seeds, for the runs that were cheapest with the first seed.

    Returns:
        `mean`: the mean cost on the lock over that on the original. The spread is that of the costs on the lock over
        the mean on the original. `reached`: the number of seeds that reached the target. None if there is one seed only.
    """
    costs: dict[str, list[float]] = {}
    seeds = 0
    for subject in SUBJECTS:
        own = [row for row in valid if row["model"] == subject]
        first = cheapest([row for row in own if seed_of(row) == first_seed], target.loss, resource)
        if first is None:
            return None
        repeats = [r for r in own if r["attack"] == first[1]["attack"] and without_seed(r) == without_seed(first[1])]
        seeds = max(seeds, len(repeats))
        reached = [cost[resource] for row in repeats if (cost := cost_to_target(row, target.loss))]
        costs[subject] = [cost for cost in reached if cost is not None]
    if seeds < 2 or not all(costs.values()):
        return None
    mean = {subject: statistics.fmean(found) for subject, found in costs.items()}
    if not mean["original"]:
        return None
    ratios = [cost / mean["original"] for cost in costs["locked"]]
    return {
        "seeds": seeds,
        "reached": {subject: len(found) for subject, found in costs.items()},
        "mean": mean["locked"] / mean["original"],
        "standard_deviation": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
        "lowest": min(ratios),
        "highest": max(ratios),
    }
