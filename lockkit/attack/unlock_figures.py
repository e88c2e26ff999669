"""Three figures of a lock, from the models of valid unlocks.

- *Effective depth*: the fewest stages of a closed-form unlock that stay close to the lock. There are two limits: one
  on the KL divergence to the lock, and one of 5 % on the rise in perplexity.
- *Unlock ratio*: the cost of the cheapest unlock within either limit, over that of a re-distillation from
  scratch (one that uses none of the lock's weights) that comes as close to the lock. 1 is ideal for the
  owner: an attacker gains nothing from the lock's weights. A zero-cost unlock is exact, not a bound.
- *Owner's advantage*: the tokens that a re-distillation from scratch needs to be as close to the lock as
  the lock is to the original, over the tokens of the lock's own distillation.

A figure that was not reached within the budget is a bound, and its text says so. Unlocked models whose figures are not
finite are ignored. If no others are left, the text of the figure is "not finite".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lockkit.attack.target import NOT_FINITE, unlock_control

if TYPE_CHECKING:
    from lockkit.attack.subjects import Subjects

PERPLEXITY_RISE = 1.05
NOT_IN_LABEL = ("points", "seed")  # settings of an unlock that are the same in all of its rows


def unlocks_of(rows: list[dict]) -> dict[str, dict]:
    """The records of unlocked models, by attack and settings. `valid` is whether the positive control passed."""
    found = {}
    for row in rows:
        if row.get("unlock"):
            control = unlock_control(row, rows)
            found[_label(row)] = row["unlock"] | {
                "attack": row["attack"],
                "from_weights": _knows_weights(row),
                "valid": bool(control and control.get("control_passed")),
                "control_won_back": control and control.get("won_back"),
            }
    return found


def _knows_weights(row: dict) -> bool:
    """Whether an unlock uses the lock's weights, and not only its inputs and outputs."""
    return row["attack"] != "random-features" and row["config"]["unlock"].get("start") not in ("scratch", "features")


def _label(row: dict) -> str:
    settings = {key: value for key, value in row["config"]["unlock"].items() if value is not None}
    return " ".join([row["attack"], *(f"{key}={value}" for key, value in settings.items() if key not in NOT_IN_LABEL)])


def _is_finite(unlock: dict) -> bool:
    """Whether the figures of an unlocked model that this file uses are finite."""
    figures = (unlock["kl_to_lock"], unlock["perplexity"], unlock["cost"]["tokens"], unlock["cost"]["flops"])
    return all(figure is not None and math.isfinite(figure) for figure in figures)


def effective_depth(subjects: Subjects, unlocks: dict[str, dict]) -> dict:
    """The effective depth under both limits. KL divergences are in nats per token."""
    best: dict[int, dict] = {}
    counted = [u for u in unlocks.values() if u["valid"] and u["from_weights"] and not u["cost"]["steps"]]
    for unlock in filter(_is_finite, counted):
        stages = unlock["blocks"]
        if unlock["kl_to_lock"] < best.get(stages, {}).get("kl_to_lock", math.inf):
            best[stages] = unlock
    not_tried = NOT_FINITE if counted else "not measured"
    limit = subjects.config.effective_depth_kl
    most = perplexity_limit(subjects)
    by_kl = [stages for stages in sorted(best) if best[stages]["kl_to_lock"] <= limit]
    by_perplexity = [stages for stages in sorted(best) if best[stages]["perplexity"] <= most]
    return {
        "stages": by_kl[0] if by_kl else None,
        "says": _stages(by_kl, best, not_tried),
        "kl_limit": limit,
        "stages_within_5_percent": by_perplexity[0] if by_perplexity else None,
        "says_within_5_percent": _stages(by_perplexity, best, not_tried),
        "depth": subjects.depth,
        "kl_by_stages": {str(stages): best[stages]["kl_to_lock"] for stages in sorted(best)},
        "perplexity_by_stages": {str(stages): best[stages]["perplexity"] for stages in sorted(best)},
    }


def perplexity_limit(subjects: Subjects) -> float:
    """The highest perplexity at which an unlocked model counts as close to the lock."""
    return PERPLEXITY_RISE * subjects.quality_of("locked").perplexity


def near_labels(unlocks: dict[str, dict], kl_limit: float, perplexity_limit: float) -> set[str]:
    """The labels of valid unlocks whose models are close to the lock, by KL divergence or by perplexity."""
    return {
        label
        for label, unlock in unlocks.items()
        if unlock["valid"]
        and _is_finite(unlock)
        and (unlock["kl_to_lock"] <= kl_limit or unlock["perplexity"] <= perplexity_limit)
    }


def _stages(within: list[int], tried: dict[int, dict], not_tried: str) -> str:
    if within:
        return str(within[0])
    return f"more than {max(tried)}" if tried else not_tried


def _scratch(unlocks: dict[str, dict]) -> list[dict]:
    """The re-distillations from scratch: those that use none of the lock's weights."""
    return [u for u in unlocks.values() if not u["from_weights"] and u["notes"].get("curve")]


def _curve(scratch: list[dict]) -> list[dict]:
    """The points (tokens, flops, kl_to_lock) of re-distillations, without those that are not finite."""
    points = [point for unlock in scratch for point in unlock["notes"]["curve"]]
    return [point for point in points if None not in (point["kl_to_lock"], point["tokens"], point["flops"])]


def _needs(*conditions: tuple[str, object]) -> dict[str, str]:
    """A figure that was not measured, with the names of what is missing; each condition is a name and what was found."""
    return {"says": "not measured: needs " + ", and ".join(name for name, found in conditions if not found)}


def _caveat(valid: bool) -> str:
    return "" if valid else "the re-distillation from scratch failed its control: its budget is too small to say"


def unlock_ratio(unlocks: dict[str, dict], kl_limit: float, perplexity_limit: float) -> dict:
    """The cost of the cheapest valid unlock over that of a re-distillation from scratch as close to the lock.

    Only unlocks that return an ordinary model are considered. Of those within either limit the cheapest is taken; if
    there is none, the one closest to the lock. If no re-distillation came as close, the ratio is an upper bound,
    computed at the end of the budget.

    Args:
        unlocks: the result of `unlocks_of`.
        kl_limit: limit of KL(lock || unlocked model), in nats per token.
        perplexity_limit: the result of the function of this name.
    """
    scratch = _scratch(unlocks)
    curve, scratch_valid = _curve(scratch), any(unlock["valid"] for unlock in scratch)
    candidates = {k: u for k, u in unlocks.items() if u["valid"] and u["blocks"] == 1 and u["from_weights"]}
    ordinary = {k: u for k, u in candidates.items() if _is_finite(u)}
    if not candidates or not scratch:
        return _needs(("a valid closed-form unlock", candidates), ("redistill", scratch))
    if not ordinary or not curve:
        return {"says": NOT_FINITE}
    near = {
        label: u for label, u in ordinary.items() if u["kl_to_lock"] <= kl_limit or u["perplexity"] <= perplexity_limit
    }
    if not near:
        near = dict([min(ordinary.items(), key=lambda item: item[1]["kl_to_lock"])])
    found: dict = {"scratch_control_passed": scratch_valid}
    says, depends_on_scratch = [], False
    for key, unit in (("tokens", "tokens"), ("flops", "operations")):
        ratios = {label: (*_over_scratch(u, curve, key), label) for label, u in near.items()}
        value, reached, label = min(ratios.values())
        reached = reached or not value  # a zero-cost unlock is exact, not a bound
        depends_on_scratch = depends_on_scratch or value > 0
        found[key] = {"value": value, "reached": reached, "unlock": label, "kl_to_lock": near[label]["kl_to_lock"]}
        says.append(f"{'' if reached else 'below '}{value:.3g} in {unit}")
    return found | {"says": ", ".join(says), "caveat": _caveat(scratch_valid or not depends_on_scratch)}


def _over_scratch(unlock: dict, curve: list[dict], key: str) -> tuple[float, bool]:
    """The ratio of costs, and whether any re-distillation from scratch came as close to the lock."""
    reached = [point[key] for point in curve if point["kl_to_lock"] <= unlock["kl_to_lock"]]
    return unlock["cost"][key] / (min(reached) if reached else max(point[key] for point in curve)), bool(reached)


def owner_advantage(lock_tokens: int, unlocks: dict[str, dict], kl_of_lock: float) -> dict:
    """The tokens of a re-distillation from scratch to the lock's own fidelity, over those of the lock.

    Args:
        lock_tokens: tokens of the lock's distillation; 0 if that is not known.
        unlocks: the result of `unlocks_of`.
        kl_of_lock: KL(original || lock), in nats per token.
    """
    scratch = _scratch(unlocks)
    curve, valid = _curve(scratch), any(unlock["valid"] for unlock in scratch)
    if not scratch or not lock_tokens:
        return _needs(("redistill", scratch), ("the tokens of the lock's distillation (lockkit.json)", lock_tokens))
    if not curve or not math.isfinite(kl_of_lock):
        return {"says": NOT_FINITE}
    reached = [point["tokens"] for point in curve if point["kl_to_lock"] <= kl_of_lock]
    value = (min(reached) if reached else max(point["tokens"] for point in curve)) / lock_tokens
    return {
        "says": f"{'' if reached else 'more than '}{value:.3g}",
        "caveat": _caveat(valid),
        "value": value,
        "reached": bool(reached),
        "scratch_control_passed": valid,
        "lock_tokens": lock_tokens,
        "kl": kl_of_lock,
    }
