"""The search for learning rates, and equal capacity of adapters on both models."""

from __future__ import annotations

import json
import math

import pytest
from test_attack import SMALL

from lockkit.attack.attacks.gradient.adapters import Lora
from lockkit.attack.audit import trial_value
from lockkit.attack.config import audit_config
from lockkit.attack.rates import RATES, RateSearch, starting_rate
from lockkit.attack.run import run_audit
from lockkit.attack.subjects import Subjects
from lockkit.attack.target import Target


def search(start: float, best: float) -> RateSearch:
    """A finished search in which the loss is lowest at `best`."""
    found = RateSearch(start)
    while (rate := found.next()) is not None:
        found.tried[rate] = abs(math.log(rate / best))
    return found


@pytest.mark.parametrize("best", RATES)
def test_the_search_finds_the_best_rate_from_anywhere_and_stops_where_the_loss_turns(best):
    for start in RATES:
        found = search(start, best)
        assert found.best == best
        tried = sorted(found.tried)
        assert min(start, best) / 4 < tried[0] and tried[-1] < 4 * max(start, best)  # and not beyond the turn
        place = RATES.index(best)
        assert {RATES[near] for near in (place - 1, place + 1) if 0 <= near < len(RATES)} <= set(tried)


def test_a_search_in_which_every_trial_diverges_goes_down():
    found = RateSearch(1e-3)
    while (rate := found.next()) is not None:
        found.tried[rate] = math.inf if rate > 1e-5 else 1 - rate
    assert found.best == 1e-5 and found.another() == 1e-6


def test_the_search_starts_lower_for_larger_models():
    assert starting_rate(4_000_000) == 1e-3
    assert starting_rate(268_000_000) == 3e-5


def test_a_trial_that_reaches_the_target_sooner_is_better_than_one_with_a_lower_loss():
    def row(*losses: float) -> dict:
        curve = [{"step": s, "tokens": s, "flops": s, "seconds": s, "loss": loss} for s, loss in enumerate(losses)]
        cost = {"peak_tensor_bytes": 1, "saved_bytes": 1}
        return {"curve": curve, "best_loss": min(losses), "config": {"steps": 8}, "cost": cost}

    target = Target(3.0, 1.0, 1.2)
    soon, low, never = row(3.0, 1.1, 1.1), row(3.0, 2.0, 0.5), row(3.0, 2.0, 1.3)
    assert trial_value(soon, target) < trial_value(low, target) < 1 < trial_value(never, target)
    assert trial_value(low, None) < trial_value(soon, None)
    assert trial_value({}, target) == math.inf


def test_lock_and_original_get_equal_trials_and_runs_end_at_the_target(originals, locks, tmp_path):
    config = audit_config("quick", **SMALL | {"steps": 16, "held_out_tokens": 128, "evaluation_tokens": 128})
    run_audit(str(locks("qwen3")), str(originals("qwen3")), tmp_path, config, ["full-ft", "last-layers"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for attack in ("full-ft", "last-layers"):
        trials = {
            model: [r for r in rows if r["attack"] == attack and r["model"] == model]
            for model in ("original", "locked")
        }
        rates = {model: {r["config"]["learning_rate"] for r in found} for model, found in trials.items()}
        assert len(trials["original"]) == len(rates["original"]) == len(rates["locked"]) >= 2
    reference = [r for r in rows if r["attack"] == "full-ft" and not r["config"]["stop_loss"]]
    assert reference and all(r["model"] == "original" and r["cost"]["steps"] == 16 for r in reference)
    ended = [r for r in rows if r["config"].get("stop_loss") and r["best_loss"] <= r["config"]["stop_loss"]]
    assert ended and all(
        r["curve"][-1]["loss"] == r["best_loss"] for r in ended
    )  # nothing is measured after the target


def test_adapters_train_as_many_parameters_on_the_lock_as_on_the_original(originals, locks):
    subjects = Subjects(str(locks("qwen3")), str(originals("qwen3")), audit_config("quick", **SMALL))
    for of in ("original", "locked"):
        counts = {}
        for subject in ("original", "locked"):
            training = Lora(Lora.Config(rank=16, capacity_of=of)).prepare(subjects.load(subject), subjects)
            counts[subject] = sum(p.numel() for p in training.parameters)
        assert counts["locked"] == pytest.approx(counts["original"], rel=0.2), of
    own = [Lora(Lora.Config(rank=16)).prepare(subjects.load(s), subjects).parameters for s in ("original", "locked")]
    assert sum(p.numel() for p in own[1]) > 1.3 * sum(p.numel() for p in own[0])  # what the match is for
