"""Ratios of costs: what the lock adds to the cost of reaching a target.

- *Amplification*: the cost to target on the lock over that on the original. Each is the lowest of all given runs, which
  have the same number of trials on both.
- *Attention-only bound*: the cost of fine-tuning everything but the chains (`frozen-dlr`, `frozen-lora`) on the lock,
  over the cheapest attack on the original. It bounds the amplification of every lock of this shape: as long as
  the chains compute the same function, their weights cannot make this attack more expensive.

Seconds of runs from other audits do not count, since they were measured at another time. Ratios of seconds have the
spread of the times of steps within the two runs; others that of seeds, if there are several.
"""

from __future__ import annotations

import statistics

from lockkit.attack.sentences import NOT_MEASURED, NOTHING_TO_COMPARE, costs, not_reached, times
from lockkit.attack.subjects import SUBJECTS
from lockkit.attack.target import (
    MEMORY,
    NOT_FINITE,
    Target,
    cheapest,
    cost_to_target,
    ratio,
    run_name,
    seed_of,
    without_seed,
)

ATTENTION_ONLY = ("frozen-dlr", "frozen-lora")
ID_CHARACTERS = 10  # of a row's key, which name a run


def amplification(valid: list[dict], target: Target, resource: str, first_seed: int) -> dict | None:
    """The cheapest attack on the lock over the cheapest on the original, with its spread. None without a base."""
    if resource == "seconds":
        valid = _timed_here(valid)
    own = {subject: [row for row in valid if row["model"] == subject] for subject in SUBJECTS}
    best = {subject: cheapest(own[subject], target.loss, resource) for subject in SUBJECTS}
    if best["original"] is None:
        return None
    original, base = best["original"]
    common = {"original": original, "best_attack_original": run_name(base), "original_run": base["key"][:ID_CHARACTERS]}
    if best["locked"] is None:
        at_least = _at_least(own["locked"], target, resource, original)
        says = not_reached(at_least) if own["locked"] else NOT_MEASURED
        if any(cost_to_target(row, target.loss) for row in own["locked"]):
            says, at_least = NOT_FINITE, None
        return {"value": None, "says": says, "at_least": at_least, "best_attack": None, **common}
    locked, row = best["locked"]
    value = ratio(locked, original)
    seeds = _over_seeds(valid, target, resource, first_seed)
    low, high = _spread(value, row, base, resource, seeds)
    return {
        "value": value,
        "says": (NOT_FINITE if original or resource in MEMORY else NOTHING_TO_COMPARE)
        if value is None
        else costs(value, low, high, exact=resource in MEMORY),
        "lowest": low,
        "highest": high,
        "best_attack": run_name(row),
        "locked": locked,
        "locked_run": row["key"][:ID_CHARACTERS],
        "seeds": seeds,
        **common,
    }


def _timed_here(rows: list[dict]) -> list[dict]:
    """The runs of this audit, without those of others."""
    return [row for row in rows if not row.get("reused")]


def _at_least(rows: list[dict], target: Target, resource: str, original: float) -> float | None:
    """What the longest run on the lock that did not reach the target spent, over the cost on the original."""
    if resource in MEMORY or not original:
        return None  # more budget does not need more memory
    spent = [row["curve"][-1][resource] for row in rows]
    return max((value / original for value in spent if value is not None), default=None)


def _spread(
    value: float | None, row: dict, base: dict, resource: str, seeds: dict | None
) -> tuple[float | None, float | None]:
    """Lower and upper end of a ratio: over seeds; for seconds also over the times of steps in both runs."""
    ends = [(seeds["lowest"], seeds["highest"])] if seeds else []
    own, others = relative_seconds(row), relative_seconds(base)
    if resource == "seconds" and value is not None and own and others:
        ends.append((value * own[0] / others[1], value * own[1] / others[0]))
    if not ends:
        return None, None
    return min(low for low, _ in ends), max(high for _, high in ends)


def relative_seconds(row: dict) -> tuple[float, float] | None:
    """The seconds of the quickest and of the slowest quarter of a run's steps, over the median."""
    low, middle, high = row.get("step_seconds") or (0.0, 0.0, 0.0)
    return (low / middle, high / middle) if low and middle else None


def attention_only(valid: list[dict], target: Target, resource: str) -> dict | None:
    """The attention-only bound, see the top of this file.

    `value_on_original` is the same figure with the attention-only fine-tune of the original in place of the lock's.
    """
    if resource == "seconds":
        valid = _timed_here(valid)
    best = cheapest([row for row in valid if row["model"] == "original"], target.loss, resource)
    if best is None:
        return None
    base, row = best
    own = {s: [r for r in valid if r["attack"] in ATTENTION_ONLY and r["model"] == s] for s in SUBJECTS}
    found = {subject: cheapest(own[subject], target.loss, resource) for subject in SUBJECTS}
    values = {subject: cost and ratio(cost[0], base) for subject, cost in found.items()}
    if not own["locked"]:
        says = f"{NOT_MEASURED}: needs the attack {ATTENTION_ONLY[0]}"
    elif found["locked"] is None:
        says = not_reached(None)
    elif values["locked"] is None:
        says = NOT_FINITE
    else:
        says = f"at most {times(values['locked'])} times as much"
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
    spent: dict[str, list[float]] = {}
    seeds = 0
    for subject in SUBJECTS:
        own = [row for row in valid if row["model"] == subject]
        first = cheapest([row for row in own if seed_of(row) == first_seed], target.loss, resource)
        if first is None:
            return None
        repeats = [r for r in own if r["attack"] == first[1]["attack"] and without_seed(r) == without_seed(first[1])]
        by_seed: dict[int, list[dict]] = {}  # with one seed, a run may be there twice: to its end, and to the target
        for row in repeats:
            by_seed.setdefault(seed_of(row), []).append(row)
        seeds = max(seeds, len(by_seed))
        reached = [best for same in by_seed.values() if (best := cheapest(same, target.loss, resource))]
        spent[subject] = [cost for cost, _ in reached]
    if seeds < 2 or not all(spent.values()):
        return None
    mean = {subject: statistics.fmean(found) for subject, found in spent.items()}
    if not mean["original"]:
        return None
    ratios = [cost / mean["original"] for cost in spent["locked"]]
    return {
        "seeds": seeds,
        "reached": {subject: len(found) for subject, found in spent.items()},
        "mean": mean["locked"] / mean["original"],
        "standard_deviation": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
        "lowest": min(ratios),
        "highest": max(ratios),
    }
