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
from test_attack import ONE_RATE, options

from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.base import NoSettings, UnlockAttack, Unlocked
from lockkit.attack.config import audit_config
from lockkit.attack.cost import Cost
from lockkit.attack.rebuild import ordinary_model
from lockkit.attack.registry import attack_class, registry
from lockkit.attack.run import run_audit
from lockkit.attack.sentences import times
from lockkit.attack.target import (
    RESOURCE_TITLES,
    cost_to_target,
)
from lockkit.dlr.view import side_by_side
from lockkit.errors import UsageError
from lockkit.models.families import decoder_layers

TINY = ONE_RATE | {"held_out_tokens": 128, "evaluation_tokens": 128, "tasks": ["signatures"]}


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
            assert found["says"].startswith("costs ")

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
    return [r for r in rows if r["config"]["learning_rate"] != 1e-3]


def test_two_processes_share_a_search_and_no_trial_is_lost_if_one_is_killed(originals, locks, tmp_path):
    locked, original, out = str(locks("qwen3")), str(originals("qwen3")), tmp_path / "audit"
    context = multiprocessing.get_context("spawn")
    # It runs the reference (the baseline on the original), the baseline on the lock, two trials, and dies in the third.
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
    assert summary["first_line"].startswith("Not measured: this audit lacks an attack that uses knowledge of the lock")

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
    chosen = [part for name in ("full-ft", NaNControl.name, Uncounted.name) for part in ("--attack", name)]
    written = []
    for _ in range(2):
        outcome = cli("attack", locks("qwen3"), "--original", originals("qwen3"), "--out", out, *options(TINY), *chosen)
        assert outcome.code == 1 and "lacks an attack that uses knowledge of the lock" in " ".join(outcome.out.split())
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
    uncounted = lines[Uncounted.name]["original"]["spent"]
    assert uncounted["flops"] is None and uncounted["tokens"] > 0
    # Operations that were not counted are not 0: the baseline's are compared. A ratio to 0 saved bytes does not exist.
    assert figures["amplification"]["flops"]["best_attack_original"] == "full-ft"
    assert figures["amplification"]["saved_bytes"]["says"] == "not finite"
    assert "memory for the backward pass" not in outcome.out  # without a verdict, ratios are left out
    assert figures["attention_only_bound"]["tokens"]["says"] == "not measured: needs the attack frozen-dlr"
    assert "no lock of this shape" not in outcome.out
    assert cli("report", out).code == 0
    assert "not finite" not in (out / "report.md").read_text()
    summary["verdict"]["missing"] = []  # as if it had a verdict
    (out / "summary.json").write_text(json.dumps(summary))
    assert cli("report", out).code == 0
    assert "not finite" in (out / "report.md").read_text()


def test_attention_only_fine_tuning_bounds_the_cost_of_a_lock(cli, originals, locks, tmp_path):
    config = TINY | {"target_share": 0.2}
    command = ["attack", locks("qwen3"), "--original", originals("qwen3"), "--out", tmp_path, *options(config)]
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
        assert f"{bound['says']} in {RESOURCE_TITLES[resource]}" in " ".join(outcome.out.split())
    assert cli("report", tmp_path).code == 0
    assert (
        f"{figures['attention_only_bound']['tokens']['value']:.1f} times in tokens"
        in (tmp_path / "report.md").read_text()
    )


def test_settings_out_of_range_name_their_option():
    with pytest.raises(UsageError, match="--sweep"):
        audit_config("quick", sweep=-1)


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
    # The reference runs once. The control of an unlock depends on the depth, so it runs for each.
    assert record["rows"][1]["runs"]["reused_from_controls"] >= 2
    for row in record["rows"]:
        assert f"| {row['lock']} | {row['perplexity_ratio']:.4f} |" in table
        found = row["amplification"]["signatures"]["tokens"]
        assert f"{times(found['value'], found['lowest'], found['highest'])} ({found['best_attack']}" in table
        assert f"{row['lock']}: {row['verdict']}" in table
