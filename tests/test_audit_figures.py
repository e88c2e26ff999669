"""The figures of an audit, from rows and records: cost to target, which runs count, and what the chains are worth."""

from __future__ import annotations

import math

import pytest
from test_audit import TINY

from lockkit.attack.config import audit_config
from lockkit.attack.finetune import FinetuneConfig
from lockkit.attack.registry import attack_class
from lockkit.attack.selection import takes_baseline_steps, unlocks_and_finetunes
from lockkit.attack.subjects import Subjects
from lockkit.attack.target import Target, cheapest, cost_to_target, reference_target, run_name, valid_runs
from lockkit.attack.unlock_figures import effective_depth, owner_advantage, unlock_ratio


@pytest.fixture(scope="module")
def bench(originals, locks):
    return Subjects(str(locks("qwen3")), str(originals("qwen3")), audit_config("quick", **TINY))


def row(attack="full-ft", model="locked", losses=(3.0, 2.0, 1.0), cost=100, family="baseline", **config) -> dict:
    curve = [
        {"step": 8 * i, "tokens": cost * i, "flops": 1e6 * cost * i, "seconds": 0.1 * i, "loss": loss}
        for i, loss in enumerate(losses)
    ]
    return {
        "key": f"{attack} {model} {losses} {config}", "attack": attack, "model": model, "family": family, "task": "t",
        "status": "finished", "config": {"seed": 0} | config, "curve": curve, "start_loss": losses[0],
        "best_loss": min(losses), "cost": {"peak_tensor_bytes": 10 * cost, "saved_bytes": cost},
    }  # fmt: skip


def test_cost_to_target_is_interpolated_between_two_points():
    assert cost_to_target(row(), 1.5) == {
        "step": 12, "tokens": 150, "flops": 1.5e8, "seconds": pytest.approx(0.15), "peak_tensor_bytes": 1000,
        "saved_bytes": 100,
    }  # fmt: skip
    assert cost_to_target(row(), 2.0)["tokens"] == 100
    assert cost_to_target(row(), 0.9) is None


def test_an_attack_that_fails_on_the_original_is_not_valid():
    target = reference_target([row(model="original")], share=0.9)
    assert target == Target(3.0, 1.0, pytest.approx(1.2))
    rows = [
        row(model="original"),
        row("broken", "original", (3.0, 2.9, 2.8), cost=1, family="optimisation"),
        row("broken", "locked", (3.0, 0.5, 0.5), cost=1, family="optimisation"),
        row("random", "locked", (3.0, 0.5, 0.5), cost=1, family="control"),
        row("full-ft", "locked", cost=200),
    ]
    valid = valid_runs(rows, "t", target)
    assert [r["attack"] for r in valid] == ["full-ft", "full-ft"]
    cost, best = cheapest([r for r in valid if r["model"] == "locked"], target.loss, "tokens")
    assert (cost, best["attack"]) == (pytest.approx(360), "full-ft")


def test_cheapest_unlocks_are_fine_tuned_with_the_cheapest_attacks_on_the_original():
    def unlocked(name: str, cost: int, **config) -> dict:
        return row(name, cost=cost, family="architecture", unlock={"k": 1}, finetune={"seed": 0}, **config)

    controls = [
        row(name, "original", family="architecture", k=1) | {"task": None, "control_passed": name != "broken"}
        for name in ("dear", "cheap", "broken")
    ]
    for control in controls:
        control["config"] = {"k": 1}
    rows = [
        *controls, row(model="original", cost=100), row("lora", "original", cost=80), row("lora", "locked", cost=90),
        unlocked("cheap", 110), unlocked("dear", 120), unlocked("broken", 1),
        unlocked("cheap", 105, finetune_attack="lora"),
    ]  # fmt: skip
    pairs = unlocks_and_finetunes(rows, "t", Target(3.0, 1.0, 1.2), seed=0)
    assert [(a["attack"], a["curve"][1]["tokens"], b["attack"], b["model"]) for a, b in pairs] == [
        ("cheap", 110, "lora", "original")
    ]
    assert [run_name(r) for r in rows[-2:]] == ["broken", "cheap, then lora"]


def test_lora_follows_every_chosen_unlock_and_quick_chooses_one():
    def unlocked(name: str, tokens: int, flops: float) -> dict:
        found = row(name, family="architecture", unlock={"of": name}, finetune={"seed": 0})
        points = [point | {"tokens": tokens * i, "flops": flops * i} for i, point in enumerate(found["curve"])]
        return found | {"curve": points}

    controls = [
        row(name, "original") | {"task": None, "control_passed": True, "config": {"of": name}} for name in ("a", "b")
    ]
    rows = [
        *controls, row(model="original", cost=100), row("lora", "original", cost=500), row("lora", "original", cost=400),
        unlocked("a", 10, 9e9), unlocked("b", 90, 1e9),
    ]  # fmt: skip
    target = Target(3.0, 1.0, 1.2)
    pairs = unlocks_and_finetunes(rows, "t", target, seed=0)
    assert {(a["attack"], b["attack"], b["curve"][1]["tokens"]) for a, b in pairs} == {
        ("a", "lora", 400),
        ("b", "lora", 400),
    }
    assert [a["attack"] for a, _ in unlocks_and_finetunes(rows, "t", target, seed=0, one_unlock=True)] == ["b"]


def test_reaching_the_target_is_enough_for_a_control():
    known = Target(start=0.5, best=0.4, loss=0.6)  # the original is at the target without fine-tuning
    assert valid_runs([row("other", "original", (0.5,)), row("other", "locked", (2.0, 0.5))], "t", known)
    assert Target(3.0, 1.0, 1.2).control_loss == 2.5


def test_memory_savers_take_the_baselines_steps():
    config, checkpointing = audit_config("standard"), attack_class("checkpointing")
    assert takes_baseline_steps(checkpointing.configured(config, checkpointing.variants()[0], 1e-3))
    assert not takes_baseline_steps(FinetuneConfig())


def unlock(kl: float, tokens: int, blocks=1, valid=True, scratch=False, steps=0, curve=()) -> dict:
    cost = {"tokens": tokens, "flops": 1e6 * tokens, "steps": steps}
    points = [{"tokens": t, "flops": 2e6 * t, "kl_to_lock": k} for t, k in curve]
    return {
        "kl_to_lock": kl, "perplexity": 10 * math.exp(kl), "blocks": blocks, "valid": valid, "from_weights": not scratch,
        "cost": cost, "notes": {"curve": points} if points else {},
    }  # fmt: skip


SCRATCH = unlock(0.02, 8000, scratch=True, steps=8, curve=[(1000, 1.0), (4000, 0.1), (8000, 0.02)])


def test_unlock_ratio_takes_the_cheapest_close_unlock_and_marks_bounds():
    unlocks = {
        "good": unlock(0.05, 1000), "better": unlock(0.03, 2000), "bad": unlock(0.5, 10),
        "invalid": unlock(0.001, 1, valid=False), "chain": unlock(0.001, 1, blocks=2), "redistill": SCRATCH,
    }  # fmt: skip
    ratio = unlock_ratio(unlocks, kl_limit=0.06, perplexity_limit=0)
    assert ratio["tokens"] == {"value": 1000 / 8000, "reached": True, "unlock": "good", "kl_to_lock": 0.05}
    assert ratio["says"] == "0.125 in tokens, 0.0625 in operations" and not ratio["caveat"]
    assert unlock_ratio(unlocks, kl_limit=0.04, perplexity_limit=0)["tokens"]["unlock"] == "better"
    none_within = unlock_ratio(unlocks, kl_limit=0.01, perplexity_limit=0)
    assert none_within["tokens"]["unlock"] == "better"  # the closest
    nearer = unlock_ratio({"near": unlock(0.001, 1000), "redistill": SCRATCH}, kl_limit=0.01, perplexity_limit=0)
    assert nearer["says"].startswith("below 0.125 in tokens") and not nearer["tokens"]["reached"]
    too_short = SCRATCH | {"valid": False}
    free = unlock_ratio({"free": unlock(0.001, 0), "redistill": too_short}, kl_limit=0.01, perplexity_limit=0)
    assert free["says"] == "0 in tokens, 0 in operations"  # a zero-cost unlock is exact, not a bound
    assert free["tokens"]["reached"] and not free["caveat"]
    failed = unlock_ratio(unlocks | {"redistill": SCRATCH | {"valid": False}}, kl_limit=0.06, perplexity_limit=0)
    assert "failed its control" in failed["caveat"]
    for found, needed in (
        ({"good": unlock(0.05, 1000)}, "redistill"),
        ({"redistill": SCRATCH}, "a valid closed-form unlock"),
        ({}, "a valid closed-form unlock, and redistill"),
    ):
        assert unlock_ratio(found, 0.06, 0)["says"] == f"not measured: needs {needed}"
    # An unlock that is close only in perplexity (10 * exp(0.05) here) counts, too.
    assert unlock_ratio(unlocks, kl_limit=0.01, perplexity_limit=10.6)["tokens"]["unlock"] == "good"


def test_figures_that_are_not_finite_are_reported_as_such(bench):
    broken = {key: unlock(0.01, 10) | {key: None} for key in ("kl_to_lock", "perplexity")}
    curve = [(1000, None)]
    nowhere = unlock(0.5, 8000, scratch=True, steps=8, curve=curve)
    assert effective_depth(bench, broken)["says"] == "not finite"
    assert unlock_ratio(broken | {"redistill": SCRATCH}, 0.06, 0)["says"] == "not finite"
    assert unlock_ratio({"good": unlock(0.05, 1000), "redistill": nowhere}, 0.06, 0)["says"] == "not finite"
    assert owner_advantage(400, {"r": nowhere}, kl_of_lock=0.1)["says"] == "not finite"
    assert owner_advantage(400, {"r": SCRATCH}, kl_of_lock=math.nan)["says"] == "not finite"
    # A broken unlock does not change the result of a good one.
    good = {"good": unlock(0.05, 1000), "redistill": SCRATCH}
    assert unlock_ratio(good | broken, kl_limit=0.06, perplexity_limit=0) == unlock_ratio(good, 0.06, 0)


def test_owner_advantage_is_tokens_from_scratch_over_those_of_the_lock():
    assert owner_advantage(400, {"r": SCRATCH}, kl_of_lock=0.1)["says"] == "10"
    assert owner_advantage(400, {"r": SCRATCH}, kl_of_lock=0.001)["says"] == "more than 20"
    assert owner_advantage(400, {}, kl_of_lock=0.1)["says"] == "not measured: needs redistill"
    without_record = owner_advantage(0, {"r": SCRATCH}, kl_of_lock=0.1)["says"]
    assert "not measured" in without_record and "lockkit.json" in without_record and "redistill" not in without_record


def test_effective_depth_is_from_valid_closed_form_unlocks_only(bench):
    most = 1.05 * bench.quality_of("locked").perplexity
    unlocks = {
        "one": unlock(0.5, 1) | {"perplexity": most + 1},
        "two": unlock(0.04, 1, blocks=2) | {"perplexity": most - 1},
        "four": unlock(0.005, 1, blocks=4) | {"perplexity": most - 1},
        "broken": unlock(0.0, 1, valid=False),
        "trained": unlock(0.0, 1, steps=100),
    }
    depth = effective_depth(bench, unlocks)
    assert (depth["says"], depth["says_within_5_percent"]) == ("4", "2")
    assert depth["kl_by_stages"] == {"1": 0.5, "2": 0.04, "4": 0.005}
    assert effective_depth(bench, {"one": unlocks["one"]})["says"] == "more than 1"
    assert effective_depth(bench, {})["says"] == "not measured"
