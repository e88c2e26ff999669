"""The summary of an audit: from rows to the figures of a lock.

- Cost to target, and which runs are valid: target.py.
- Amplifications and the attention-only bound: ratios.py. Amplifications are computed three times: over all attacks, over
  scripts off the shelf, and over runs after which the model keeps its utility on general text.
- Effective depth, unlock ratio and owner's advantage: unlock_figures.py. The verdict: verdict.py.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lockkit.attack.audited import audited_model
from lockkit.attack.ratios import ID_CHARACTERS, amplification, attention_only, relative_seconds
from lockkit.attack.record import SCHEMA, Summary
from lockkit.attack.registry import registry
from lockkit.attack.selection import BASELINE
from lockkit.attack.sentences import ADVERSARY, FALSIFIED_BY, INVALID
from lockkit.attack.subjects import SUBJECTS
from lockkit.attack.target import (
    RESOURCES,
    Target,
    cheapest,
    control_passed,
    cost_to_target,
    run_name,
    runs_of,
    unlock_control,
    valid_runs,
)
from lockkit.attack.unlock_figures import (
    effective_depth,
    near_labels,
    owner_advantage,
    perplexity_limit,
    unlock_ratio,
    unlocks_of,
)
from lockkit.attack.verdict import lacking, verdict_of
from lockkit.version import git_hash, versions

if TYPE_CHECKING:
    from lockkit.attack.base import Attack
    from lockkit.attack.subjects import Subjects


def summarise(
    subjects: Subjects,
    rows: list[dict],
    attacks: list[type[Attack]],
    left_out: list[str],
    targets: dict[str, Target],
    sweeps: list[dict],
) -> dict:
    """The summary of an audit as JSON values. Figures that are not finite are None.

    Args:
        rows: all rows of this audit.
        attacks: the attacks that were chosen.
        left_out: names of chosen attacks that need chains, which the lock has not.
        targets: the target of each task.
        sweeps: the records of its searches (sweep.py).
    """
    unlocks = unlocks_of(rows)
    quality = {subject: subjects.quality_of(subject).record() for subject in SUBJECTS}
    perplexity_ratio = subjects.fidelity.perplexity_ratio
    limit = perplexity_limit(subjects)
    tasks = {
        task: subjects.tasks[task].record() | _task_figures(subjects, rows, task, targets[task])
        for task in subjects.tasks
    }
    missing = _missing(rows, targets, subjects.has_chains)
    summary = Summary.model_validate({
        "schema": SCHEMA,
        "verdict": {"level": "not measured", "sentence": "", "missing": missing, "rules": []},
        "first_line": "",
        "locked": subjects.names["locked"],
        "original": subjects.names["original"],
        "models": {subject: audited_model(subjects, subject) for subject in SUBJECTS},
        "has_chains": subjects.has_chains,
        "quality": quality | {"perplexity_ratio": perplexity_ratio, "fidelity": subjects.fidelity.record()},
        "lock": _lock(subjects),
        "tasks": tasks,
        "unlocks": unlocks,
        "effective_depth": effective_depth(subjects, unlocks),
        "unlock_ratio": unlock_ratio(unlocks, subjects.config.effective_depth_kl, limit),
        "owner_advantage": owner_advantage(subjects.lock_tokens, unlocks, quality["locked"]["kl_to_original"]),
        "sweeps": [sweep | {"best_so_far": _best_so_far(sweep["trials"])} for sweep in sweeps],
        "probes": [_probe(row) for row in rows if row["model"] == "locked" and row["task"] is None],
        "runs": _runs(rows),
        "row_keys": [row["key"] for row in rows],
        "not_tried": _not_tried(rows, attacks, left_out),
        "adversary": ADVERSARY,
        "budget": _budget(subjects),
        "falsified_by": FALSIFIED_BY,
        "config": subjects.config.model_dump(),
        "identity": subjects.identity(),
        "versions": versions(),
        "git_hash": git_hash(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    })  # fmt: skip
    near = near_labels(unlocks, subjects.config.effective_depth_kl, limit)
    summary.verdict = verdict_of(summary.tasks, unlocks, near, missing, perplexity_ratio, subjects.has_chains)
    summary.first_line = summary.verdict.sentence if summary.verdict.missing else ""
    return summary.record()


def _missing(rows: list[dict], targets: dict[str, Target], has_chains: bool) -> list[str]:
    """What has to run on the lock before the audit can say anything."""
    found = {
        row["attack"]: row
        for task, target in targets.items()
        for row in valid_runs(rows, task, target)
        if row["model"] == "locked"
    }
    others = {name: row for name, row in found.items() if name != BASELINE and not row.get("off_the_shelf")}
    informed = {name: bool(row["lock_aware"]) for name, row in others.items()}
    missing = lacking(informed, BASELINE in found, has_chains)
    return missing if BASELINE in found else [missing[0] + _why(rows, BASELINE), *missing[1:]]


def _why(rows: list[dict], attack: str) -> str:
    notes = [row["note"] for row in rows if row["attack"] == attack and row["model"] == "locked" and row["note"]]
    return f" ({notes[0]})" if notes else ""


def _lock(subjects: Subjects) -> dict:
    recipe = subjects.record.get("recipe") or {}
    return {
        "depth": subjects.depth,
        "init": recipe.get("init"),
        "coupling": recipe.get("coupling"),
        "layers": [{"layer": r["layer"], "nmse": r.get("nmse")} for r in subjects.record.get("layers") or []],
    }


def _budget(subjects: Subjects) -> str:
    config = subjects.config
    searched = f", and {config.sweep} trials of a search per attack" if config.sweep else ""
    return (
        f"{config.steps} steps per run, each of {config.batch_rows} rows of {config.block_tokens} tokens, "
        f"{_rates(subjects)}{searched}, the same for lock and original; "
        f"{config.unlock_tokens:,} unlabelled tokens for closed-form unlocks, {config.redistill_tokens:,} for a re-distillation"
    )


def _rates(subjects: Subjects) -> str:
    rates = subjects.config.learning_rates
    return f"learning rates {', '.join(map(str, rates))}" if rates else "a search for the learning rate of each attack"


def _probe(row: dict) -> dict:
    """The row of a probe without the entries that all rows have."""
    common = ("schema", "key", "family", "lock_aware", "off_the_shelf", "model", "task", "reused")
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


def _not_tried(rows: list[dict], attacks: list[type[Attack]], left_out: list[str]) -> list[str]:
    """The attacks that were not chosen, and with a reason those that could not run at all."""
    found = sorted(set(registry()) - {attack.name for attack in attacks} - set(left_out))
    found += [f"{name} (it needs chains, and LOCKED is no lock of lockkit)" for name in left_out]
    for attack in attacks:
        own = [row for row in rows if row["attack"] == attack.name]
        if own and all(row["status"] in ("unavailable", "failed", "out-of-memory") for row in own):
            found.append(f"{attack.name} ({own[0]['note']})")
    return found


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


def _task_figures(subjects: Subjects, rows: list[dict], task: str, target: Target) -> dict:
    seed = subjects.config.seed
    valid = valid_runs(rows, task, target)
    kinds = {
        "amplification": valid,
        "off_the_shelf": [row for row in valid if row.get("off_the_shelf")],
        "within_utility": [row for row in valid if _keeps_utility(row, subjects)],
    }
    ratios = {kind: {key: amplification(runs, target, key, seed) for key in RESOURCES} for kind, runs in kinds.items()}
    used = {
        found[end] for by_key in ratios.values() for found in by_key.values() if found
        for end in ("locked_run", "original_run") if found.get(end)
    }  # fmt: skip
    return {
        "start_loss": target.start,
        "reference_loss": target.best,
        "target_loss": target.loss,
        "attacks": _attack_table(subjects, rows, task, target),
        "runs": [_run(subjects, row, target) for row in valid if row["key"][:ID_CHARACTERS] in used],
        **ratios,
        "attention_only_bound": {key: attention_only(valid, target, key) for key in RESOURCES},
    }


def _general_ratio(row: dict, subjects: Subjects) -> float | None:
    """Perplexity on general text after a run, over that of the model before."""
    loss = row.get("general_loss")
    if loss is None:
        return None
    rise = loss - subjects.general_losses[row["model"]]
    return math.exp(rise) if rise < 100 else None  # beyond all use


def _keeps_utility(row: dict, subjects: Subjects) -> bool:
    found = _general_ratio(row, subjects)
    return found is not None and found <= subjects.config.utility_rise


def _run(subjects: Subjects, row: dict, target: Target) -> dict:
    """A row as a `Run` of the summary."""
    return {
        "id": row["key"][:ID_CHARACTERS],
        "attack": run_name(row),
        "model": row["model"],
        "settings": row["config"],
        "trained_parameters": row.get("trained_parameters"),
        "best_loss": row["best_loss"],
        "spent": cost_to_target(row, target.loss),
        "seconds_spread": relative_seconds(row),
        "general_perplexity_ratio": _general_ratio(row, subjects),
    }


def _shown(rows: Iterable[dict], target: Target) -> dict | None:
    """The run that stands for an attack: the cheapest to the target, else the one with the lowest loss."""
    rows = list(rows)
    best = cheapest(rows, target.loss, "flops") or cheapest(rows, target.loss, "tokens")
    return best[1] if best else min(rows, key=lambda row: row["best_loss"], default=None)


def _attack_table(subjects: Subjects, rows: list[dict], task: str, target: Target) -> list[dict]:
    """One entry per attack: control, and one run on each model."""
    table = []
    runs = runs_of(rows, task)
    for name in dict.fromkeys(run_name(row) for row in rows if row["task"] == task or _control_did_not_run(row)):
        own = {subject: [r for r in runs if run_name(r) == name and r["model"] == subject] for subject in SUBJECTS}
        passed = [control_passed(row, rows, target) for row in own["original"] + own["locked"]]
        counted = [row for row in own["locked"] if control_passed(row, rows, target)] or own["locked"]
        valid = any(passed)
        ended = {row["status"]: row["note"] for row in rows if run_name(row) == name and row["task"] in (task, None)}
        says = "" if valid else INVALID if passed else "; ".join(note or s for s, note in ended.items())
        control = next((unlock_control(row, rows) for row in counted if "unlock" in row["config"]), None)
        first = next(row for row in rows if run_name(row) == name)
        line: dict[str, Any] = {
            "attack": name,
            "kind": "off the shelf" if first.get("off_the_shelf") else "informed",
            "family": first["family"],
            "description": _does(first),
            "valid": valid,
            "says": says,
            "trials_original": len(own["original"]),
            "trials_locked": len(own["locked"]),
            "control_won_back": control and control.get("won_back"),
        }
        for subject, chosen in (("original", own["original"]), ("locked", counted)):
            found = _shown(chosen, target)
            line[subject] = found and _run(subjects, found, target)
        table.append(line)
    return table


def _does(row: dict) -> str:
    """What the attack of a row does."""
    names = (row["attack"], row["config"].get("finetune_attack"))
    known = [found.description for name in names if name and (found := registry().get(name))]
    return " Then: ".join(known)


def _control_did_not_run(row: dict) -> bool:
    """Whether this is a control of an unlock that did not finish, so that the unlock did not run on the lock."""
    return row["model"] == "original" and row["task"] is None and row["status"] != "finished"
