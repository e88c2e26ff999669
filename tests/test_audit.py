"""A whole audit: shared rows of the original, seeds and tasks, searches by several processes, failures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
from test_attack import SMALL

from lockkit.attack.attacks.full_ft import FullFinetune
from lockkit.attack.base import NoSettings, UnlockAttack, Unlocked
from lockkit.attack.bench import Bench
from lockkit.attack.config import audit_config
from lockkit.attack.cost import Cost
from lockkit.attack.finetune import FinetuneConfig
from lockkit.attack.rebuild import ordinary_model
from lockkit.attack.registry import attack_class, registry
from lockkit.attack.run import run_audit
from lockkit.attack.selection import groups, takes_baseline_steps, unlocks_and_finetunes
from lockkit.attack.target import Target, cheapest, cost_to_target, reference_target, run_name, valid_runs
from lockkit.attack.unlock_figures import effective_depth, owner_advantage, unlock_ratio
from lockkit.dlr.view import side_by_side
from lockkit.errors import UsageError
from lockkit.models.families import decoder_layers

TINY = SMALL | {"held_out_tokens": 128, "evaluation_tokens": 128, "tasks": ["signatures"]}


@pytest.fixture(scope="module")
def bench(originals, locks):
    return Bench(str(locks("qwen3")), str(originals("qwen3")), audit_config("quick", **TINY))


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


def test_lock_and_original_have_the_same_trials_of_every_attack():
    config = audit_config("standard")
    for attack in registry().values():
        trials = attack.trials(config)
        assert sum(len(group) for group in groups(trials)) == len(trials)
    assert takes_baseline_steps(attack_class("checkpointing").trials(config)[0])
    assert not takes_baseline_steps(FinetuneConfig())


def test_standard_repeats_the_cheapest_attacks_and_rows_of_the_original_are_reused(originals, locks, tmp_path):
    lock, original = locks("qwen3"), str(originals("qwen3"))
    config = audit_config(
        "standard",
        **TINY | {"tasks": ["signatures", "docstrings"], "seeds": 2, "learning_rates": [1e-3, 3e-3], "steps": 16},
    )
    attacks = ["full-ft", "linearised-stack", "reversal", "checkpointing"]
    summary = run_audit(str(lock), original, tmp_path / "a", config, attacks)
    rows = [json.loads(line) for line in (tmp_path / "a" / "rows.jsonl").read_text().splitlines()]
    assert {r["task"] for r in rows if r["attack"] == "full-ft"} == {"signatures", "docstrings"}
    assert len([r for r in rows if r["attack"] == "reversal" and r["model"] == "locked" and r["task"] == "signatures"
                and r["config"]["saver"] == "reversal" and r["config"]["seed"] == 0]) == 1  # at one rate  # fmt: skip
    then = [r for r in rows if r["config"].get("finetune_attack")]
    # Checkpointing takes the baseline's steps and saves fewer bytes: it is the cheapest on the original in that resource.
    assert ("linearised-stack", "checkpointing") in {(r["attack"], r["config"]["finetune_attack"]) for r in then}
    assert all(r["model"] == "locked" for r in then)
    assert all(r["cost"]["tokens"] > r["finetune_cost"]["tokens"] for r in then)  # the cost of the unlock is added
    for task in summary["tasks"].values():
        for resource in ("tokens", "flops", "seconds", "peak_tensor_bytes"):
            found = task["amplification"][resource]
            assert found["seeds"]["seeds"] == 2
            assert found["seeds"]["lowest"] <= found["seeds"]["mean"] <= found["seeds"]["highest"]
            assert found["says"] == f"costs {found['value']:.2f} times as much against these attacks"

    other = tmp_path / "other lock"  # another lock of the same shape: other weights, other hash
    shutil.copytree(lock, other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    safetensors.torch.save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    again = run_audit(str(other), original, tmp_path / "b", config, attacks[:2], controls=[tmp_path / "a"])
    rows = [json.loads(line) for line in (tmp_path / "b" / "rows.jsonl").read_text().splitlines()]
    made = [r for r in rows if r["model"] == "original" and not r["reused"]]
    # The runs with a second seed depend on the cheapest attacks on each lock. All other rows are reused.
    assert all(r["config"].get("seed") for r in made)
    assert again["runs"]["reused_from_controls"] >= 5
    assert not any(r["reused"] for r in rows if r["model"] == "locked")


def test_controls_must_be_an_audit(cli, originals, locks, tmp_path):
    outcome = cli(
        "attack", locks("qwen3"), "--original", originals("qwen3"), "--out", tmp_path / "o", "--controls", tmp_path
    )
    assert outcome.code == 2 and "change --controls" in outcome.err
    assert not (tmp_path / "o").exists()


SWEEP = TINY | {"sweep": 4}


def _sweep(locked: str, original: str, out: str, dies_in: int | None = None) -> None:
    """An audit in a separate process, which is killed during its run number `dies_in`."""
    import torch

    from lockkit.attack import rows

    torch.set_num_threads(1)
    guarded, runs = rows.guarded, itertools.count(1)

    def run(work):
        found = guarded(work)
        if next(runs) == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    rows.guarded = run
    run_audit(locked, original, Path(out), audit_config("quick", **SWEEP), ["full-ft"])


def _trials(out: Path) -> list[dict]:
    """The rows of finished trials of a search, without repetition."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len({r["key"] for r in rows}) == len(rows)
    grid = [c.model_dump() for c in attack_class("full-ft").trials(audit_config("quick", **SWEEP))]
    return [r for r in rows if r["config"] not in grid]


def test_two_processes_share_a_search_and_no_trial_is_lost_if_one_is_killed(originals, locks, tmp_path):
    locked, original, out = str(locks("qwen3")), str(originals("qwen3")), tmp_path / "audit"
    context = multiprocessing.get_context("spawn")
    # It runs the baseline on both models and two trials, and is killed in the third.
    victim = context.Process(target=_sweep, args=(locked, original, str(out), 5))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert len(_trials(out)) == 2
    before = (out / "rows.jsonl").read_text()

    workers = [context.Process(target=_sweep, args=(locked, original, str(out))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert (out / "rows.jsonl").read_text().startswith(before)
    trials = _trials(out)
    assert [sum(r["model"] == subject for r in trials) for subject in ("original", "locked")] == [4, 4]
    summary = json.loads((out / "summary.json").read_text())
    for sweep in summary["sweeps"]:
        assert [t["number"] for t in sweep["trials"]] == list(range(4))
        losses = {r["best_loss"] for r in trials if r["model"] == sweep["model"]}
        assert {t["loss"] for t in sweep["trials"]} == losses
        best = [point["loss"] for point in sweep["best_so_far"]]
        assert best == sorted(best, reverse=True) and best[-1] == min(losses)


def test_a_failed_run_is_recorded_and_tried_again(originals, locks, tmp_path, monkeypatch):
    lora = attack_class("lora")

    def prepare(self, model, bench):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(lora, "prepare", prepare)
    arguments = str(locks("qwen3")), str(originals("qwen3")), tmp_path / "a", audit_config("quick", **TINY)
    summary = run_audit(*arguments, ["lora", "full-ft"])
    assert {r["status"] for r in summary["runs"]["not_finished"]} == {"out-of-memory"}
    line = next(a for a in summary["tasks"]["signatures"]["attacks"] if a["attack"] == "lora")
    assert line["says"] == "out of memory" and line["locked"] is None
    assert "lora (out of memory)" in summary["not_tried"]
    assert summary["tasks"]["signatures"]["amplification"]["tokens"]["value"]
    assert summary["first_line"].startswith("This audit has no attack that uses knowledge of the lock")

    monkeypatch.undo()  # now there is enough memory: the same command runs only these rows again
    again = run_audit(*arguments, ["lora", "full-ft"])
    assert not again["runs"]["not_finished"]


class NaNControl(UnlockAttack):
    """An unlock whose control returns a model with NaN weights."""

    name, description, reference, Config = "nan-control", "", "", NoSettings

    @classmethod
    def trials(cls, audit):
        return [NoSettings()]

    def unlock(self, locked, bench):
        model = ordinary_model(locked, bench.family, [side_by_side(layer.mlp) for layer in decoder_layers(locked)])
        if locked is not bench.frozen("locked"):
            model.get_input_embeddings().weight.detach().fill_(math.nan)
        return Unlocked(model, 1, Cost(), {"error": math.inf})


class Uncounted(FullFinetune):
    """The baseline without counted operations and without saved bytes."""

    name = "uncounted"

    def run(self, model, bench, task):
        result = super().run(model, bench, task)
        curve = [dataclasses.replace(point, flops=math.nan) for point in result.curve]
        cost = dataclasses.replace(result.cost, flops=math.nan, saved_bytes=0)
        return dataclasses.replace(result, curve=curve, cost=cost)


def strict_json(text: str):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_an_audit_with_a_nan_in_a_control_is_written_and_resumes(cli, originals, locks, tmp_path, monkeypatch):
    for attack in (NaNControl, Uncounted):
        monkeypatch.setitem(registry(), attack.name, attack)
    out = tmp_path / "audit"
    options = [
        f"--{key.replace('_', '-')}={value}" for key, value in (TINY | {"task": "signatures"}).items() if key != "tasks"
    ]
    chosen = [part for name in ("full-ft", NaNControl.name, Uncounted.name) for part in ("--attack", name)]
    written = []
    for _ in range(2):
        outcome = cli("attack", locks("qwen3"), "--original", originals("qwen3"), "--out", out, *options, *chosen)
        assert outcome.code == 0, outcome.err
        written.append((out / "rows.jsonl").read_text())
        summary = strict_json((out / "summary.json").read_text())
    assert written[0] == written[1]
    rows = [strict_json(line) for line in written[0].splitlines()]
    assert {r["status"] for r in rows} == {"finished"}
    control = next(r for r in rows if r["attack"] == NaNControl.name and r["model"] == "original")
    assert (control["control_kl"], control["won_back"], control["control_passed"]) == (None, None, False)
    assert next(iter(summary["unlocks"].values()))["notes"] == {"error": None}
    figures = summary["tasks"]["signatures"]
    lines = {line["attack"]: line for line in figures["attacks"]}
    assert lines[NaNControl.name]["says"] == "attack invalid"
    assert lines[Uncounted.name]["original"]["flops"] is None and lines[Uncounted.name]["original"]["tokens"] > 0
    # Operations that were not counted are not 0: the baseline's are compared. A ratio to 0 saved bytes does not exist.
    assert figures["amplification"]["flops"]["best_attack_original"] == "full-ft"
    assert figures["amplification"]["saved_bytes"]["says"] == "not finite"
    assert "saved bytes: not finite" in outcome.out
    assert figures["attention_only_bound"]["tokens"]["says"] == "not measured: needs the attack frozen-dlr"
    assert "bound" not in outcome.out
    assert cli("report", out).code == 0
    assert "not finite" in (out / "report.md").read_text()


def test_attention_only_fine_tuning_bounds_the_cost_of_a_lock(cli, originals, locks, tmp_path):
    config = TINY | {"target_share": 0.2, "task": "signatures"}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in config.items() if key != "tasks"]
    command = ["attack", locks("qwen3"), "--original", originals("qwen3"), "--out", tmp_path, *options]
    outcome = cli(*command, "--attack", "full-ft", "--attack", "frozen-dlr")
    assert outcome.code == 0, outcome.err
    figures = json.loads((tmp_path / "summary.json").read_text())["tasks"]["signatures"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for resource in ("tokens", "flops", "saved_bytes"):
        spent = {}
        for r in rows:
            if cost := cost_to_target(r, figures["target_loss"]):
                spent.setdefault((r["model"], r["attack"]), []).append(cost[resource])
        least = min(min(costs) for (model, _), costs in spent.items() if model == "original")
        bound = figures["attention_only_bound"][resource]
        assert bound["value"] == pytest.approx(min(spent["locked", "frozen-dlr"]) / least)
        assert bound["value_on_original"] == pytest.approx(min(spent["original", "frozen-dlr"]) / least)
        assert figures["amplification"][resource]["value"] <= bound["value"]
        assert f"at most {bound['value']:.2f} times as much in {resource.replace('_', ' ')}" in " ".join(
            outcome.out.split()
        )
    assert cli("report", tmp_path).code == 0
    assert f"{figures['attention_only_bound']['tokens']['value']:.2f} in tokens" in (tmp_path / "report.md").read_text()


def test_settings_out_of_range_name_their_option():
    with pytest.raises(UsageError, match="--sweep"):
        audit_config("quick", sweep=-1)


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
    assert "not measured" in unlock_ratio({"good": unlock(0.05, 1000)}, 0.06, 0)["says"]
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
    assert "not measured" in owner_advantage(0, {"r": SCRATCH}, kl_of_lock=0.1)["says"]


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


def test_one_command_compares_locks(originals, tmp_path, monkeypatch):
    out, work = tmp_path / "table", tmp_path / "work"
    arguments = [
        *("--out", out, "--work", work, "--model", originals("qwen3"), "--depth", 3, 4, "--init", "teacher"),
        *("--quick", "--data", "stdlib", "--attack", "full-ft", "--attack", "stack-solve", "--device", "cpu"),
    ]
    monkeypatch.setattr("sys.argv", ["compare_locks.py", *map(str, arguments)])
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "compare_locks.py"))
    tool["main"]()
    record, table = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()
    assert [row["lock"] for row in record["rows"]] == ["teacher-3", "teacher-4"]
    assert "Attacks: `full-ft`, `stack-solve`." in table
    # The baseline on the original runs once. The control of an unlock depends on the depth, so it runs for each.
    assert record["rows"][1]["runs"]["reused_from_controls"] == 1
    for row in record["rows"]:
        assert f"| {row['lock']} | {row['perplexity_ratio']:.4f} |" in table
        assert f"{row['amplification']['signatures']['tokens']['value']:.2f} (" in table
