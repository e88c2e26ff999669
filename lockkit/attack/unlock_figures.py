"""Three figures of a lock, from the models that valid unlocks made of it.

- *Effective depth*: the fewest stages of a closed-form unlock that stay near the lock: within a KL
  divergence, and within a rise in perplexity of 5 %.
- *Unlock ratio*: what the cheapest unlock that is near in either sense cost, over what a re-distillation from
  scratch (one that knows nothing of the lock's weights) needs to come as close to the lock. 1 is ideal for the
  owner: knowing the lock saves nothing.
- *Owner's advantage*: tokens that a re-distillation from scratch needs to be as close to the lock as
  the lock is to the original, over the tokens the lock took.

What was not reached within the budget gives a bound, and says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lockkit.attack.target import unlock_control

if TYPE_CHECKING:
    from lockkit.attack.bench import Bench

PERPLEXITY_RISE = 1.05
NOT_TOLD = ("points", "seed")  # of an unlock's settings: the same in all of its rows


def unlocks_of(rows: list[dict]) -> dict[str, dict]:
    """What unlocks made, by name and settings; `valid` is whether the control passed."""
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
    """Whether an unlock starts from the lock's weights, and not from its inputs and outputs alone."""
    return row["attack"] != "random-features" and row["config"]["unlock"].get("start") not in ("scratch", "features")


def _label(row: dict) -> str:
    settings = {key: value for key, value in row["config"]["unlock"].items() if value is not None}
    return " ".join([row["attack"], *(f"{key}={value}" for key, value in settings.items() if key not in NOT_TOLD)])


def effective_depth(bench: Bench, unlocks: dict[str, dict]) -> dict:
    """The fewest stages of a closed-form unlock within the stated KL, and within 5 % of the perplexity."""
    best: dict[int, dict] = {}
    for unlock in unlocks.values():
        closed_form = not unlock["cost"]["steps"]
        stages = unlock["blocks"]
        counts = unlock["valid"] and unlock["from_weights"] and closed_form
        if counts and unlock["kl_to_lock"] < best.get(stages, {}).get("kl_to_lock", math.inf):
            best[stages] = unlock
    limit = bench.config.effective_depth_kl
    most = perplexity_limit(bench)
    by_kl = [stages for stages in sorted(best) if best[stages]["kl_to_lock"] <= limit]
    by_perplexity = [stages for stages in sorted(best) if best[stages]["perplexity"] <= most]
    return {
        "stages": by_kl[0] if by_kl else None,
        "says": _stages(by_kl, best),
        "kl_limit": limit,
        "stages_within_5_percent": by_perplexity[0] if by_perplexity else None,
        "says_within_5_percent": _stages(by_perplexity, best),
        "depth": bench.depth,
        "kl_by_stages": {str(stages): best[stages]["kl_to_lock"] for stages in sorted(best)},
        "perplexity_by_stages": {str(stages): best[stages]["perplexity"] for stages in sorted(best)},
    }


def perplexity_limit(bench: Bench) -> float:
    """The perplexity up to which an unlocked model counts as near the lock."""
    return PERPLEXITY_RISE * bench.quality_of("locked").perplexity


def _stages(within: list[int], tried: dict[int, dict]) -> str:
    if within:
        return str(within[0])
    return f"more than {max(tried)}" if tried else "not measured"


def _scratch_curve(unlocks: dict[str, dict]) -> tuple[list[dict], bool]:
    """Points (tokens, flops, kl_to_lock) of all re-distillations that know nothing of the lock's weights.

    Beside them, whether any of these passed its control.
    """
    scratch = [u for u in unlocks.values() if not u["from_weights"] and u["notes"].get("curve")]
    points = [point for unlock in scratch for point in unlock["notes"]["curve"]]
    return points, any(unlock["valid"] for unlock in scratch)


def _caveat(valid: bool) -> str:
    return "" if valid else "the re-distillation from scratch failed its control: its budget is too small to say"


def unlock_ratio(unlocks: dict[str, dict], kl_limit: float, perplexity_limit: float) -> dict:
    """Cost of the cheapest valid unlock over that of a re-distillation from scratch as close to the lock.

    Unlocks within either limit compete (KL to the lock, or perplexity), or the closest alone if none is. Only
    ordinary models count. Where no re-distillation came as close, the ratio is below what the budget's end gives.
    """
    curve, scratch_valid = _scratch_curve(unlocks)
    ordinary = {k: u for k, u in unlocks.items() if u["valid"] and u["blocks"] == 1 and u["from_weights"]}
    if not ordinary or not curve:
        return {"says": "not measured: needs a valid closed-form unlock, and redistill"}
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
        reached = reached or not value  # nothing is below an unlock for nothing
        depends_on_scratch = depends_on_scratch or value > 0
        found[key] = {"value": value, "reached": reached, "unlock": label, "kl_to_lock": near[label]["kl_to_lock"]}
        says.append(f"{'' if reached else 'below '}{value:.3g} in {unit}")
    return found | {"says": ", ".join(says), "caveat": _caveat(scratch_valid or not depends_on_scratch)}


def _over_scratch(unlock: dict, curve: list[dict], key: str) -> tuple[float, bool]:
    """The ratio, and whether a re-distillation from scratch came as close to the lock at all."""
    reached = [point[key] for point in curve if point["kl_to_lock"] <= unlock["kl_to_lock"]]
    return unlock["cost"][key] / (min(reached) if reached else max(point[key] for point in curve)), bool(reached)


def owner_advantage(lock_tokens: int, unlocks: dict[str, dict], kl_of_lock: float) -> dict:
    """Tokens of a re-distillation from scratch to the lock's own fidelity, over the tokens the lock took.

    Args:
        lock_tokens: what the lock took; 0 if that is not known.
        kl_of_lock: KL(original || lock), nats a token.
    """
    curve, valid = _scratch_curve(unlocks)
    if not curve or not lock_tokens:
        return {"says": "not measured: needs redistill, and the lock's lockkit.json"}
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
