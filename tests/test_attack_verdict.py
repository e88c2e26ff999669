"""What an audit says: the verdict and its rules, figures that can be recomputed, and what was not measured."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from test_attack import ONE_RATE, options

from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.attacks.gradient.reparametrise import Reparametrise
from lockkit.attack.audited import audited_sentence
from lockkit.attack.config import audit_config
from lockkit.attack.record import Amplification, TaskSummary, Verdict, read_summary
from lockkit.attack.registry import registry
from lockkit.attack.run import run_audit
from lockkit.attack.sentences import costs, level_of, times
from lockkit.attack.subjects import Subjects
from lockkit.attack.target import RESOURCES
from lockkit.attack.verdict import verdict_of
from lockkit.models.families import decoder_layers
from lockkit.models.load import load_model
from lockkit.publish.results import audit_results

ROOT = Path(__file__).parents[1]
TINY = ONE_RATE | {"held_out_tokens": 128, "evaluation_tokens": 128}


def test_a_ratio_has_as_many_digits_as_its_spread_allows():
    assert times(0.834, 0.83, 0.84) == "0.83"
    assert times(0.834, 0.6, 1.1) == "0.8"
    assert times(3.6, 1.0, 6.0) == "4"
    assert times(0.834) == "0.8"  # one run: its spread is not known
    assert times(1.004, exact=True) == "1.00"
    assert times(math.nan) == "not finite"
    assert costs(1.52, 1.31, 1.75) == "costs 1.5 times as much (1.3 to 1.8)"


@pytest.mark.parametrize(
    ("value", "at_least", "level"),
    [(0.9, None, "none"), (1.5, None, "little"), (3.0, None, "some"), (10.0, None, "strong"), (None, 12.0, "strong"),
     (None, 2.0, "not measured"), (None, None, "not measured")],
)  # fmt: skip
def test_the_level_follows_from_the_rules(value, at_least, level):
    assert level_of(value, at_least) == level


def verdict(flops: dict | None, scripts: dict | None = None, unlocks=None, missing=(), chains=True) -> Verdict:
    """The verdict of an audit with one task and these ratios of operations."""

    def ratios(found: dict | None) -> dict:
        empty = {"says": "", "best_attack": "a", "best_attack_original": "b"}
        return dict.fromkeys(RESOURCES) | ({"flops": Amplification(**empty, **found)} if found else {})

    none = dict.fromkeys(RESOURCES)
    task = TaskSummary.model_construct(amplification=ratios(flops), off_the_shelf=ratios(scripts), within_utility=none)
    found = unlocks or {}
    return verdict_of({"t": task}, found, set(found), list(missing), 1.0, chains)


def test_the_verdict_names_the_unlock_and_both_attackers():
    unlock = {"attack": "corrected-stack", "valid": True, "blocks": 1, "cost": {"tokens": 0}}
    said = verdict({"value": 0.95}, {"value": 3.4}, {"free": unlock})
    assert said.level == "none" and said.rules
    assert "no protection against someone who knows the method: fine-tuning it costs 0.9 times" in said.sentence
    assert "corrected-stack turned it back into the original's architecture with no data." in said.sentence
    assert "scripts ask for 3.4 times the operations" in said.sentence
    assert "withstood" in verdict({"value": None, "at_least": 20.0}).sentence
    assert "None of the" not in said.sentence and "lock itself" not in said.sentence
    other = verdict({"value": 4.0}, chains=False)
    assert other.level == "some" and other.sentence.startswith("This model gives some")
    assert "no unlock was tried" in other.sentence and "scripts were not measured" in other.sentence


@pytest.mark.parametrize("flops", [None, {"value": None, "at_least": 1.2}])
def test_a_verdict_without_a_figure_is_not_measured(flops):
    said = verdict(flops)
    assert said.level == "not measured" and "a larger budget (--steps)" in said.sentence
    assert verdict({"value": 1.0}, missing=["the baseline"]).sentence == "Not measured: this audit lacks the baseline."


def test_an_audit_in_which_nothing_ran_on_the_lock_says_so_and_exits_with_1(
    cli, originals, locks, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    command = ["attack", locks("qwen3"), "--original", originals("qwen3"), "--out", tmp_path, *options(TINY)]
    outcome = cli(*command, "--attack", "lora")
    assert outcome.code == 1
    assert "Not measured: this audit lacks the baseline (full-ft) on the lock" in " ".join(outcome.out.split())
    assert "budget" not in outcome.out.replace("> budget", "") and "costs" not in outcome.out
    lines = outcome.err.splitlines()
    early = next(place for place, line in enumerate(lines) if "these attacks cannot give a verdict" in line)
    assert early < next(place for place, line in enumerate(lines) if "full-ft on the original" in line)
    assert "the baseline (full-ft) on the lock; an attack that uses knowledge" in lines[early]
    runs = [line for line in lines if not re.search(r": \d+ of \d+, ", line)]  # without signs of life of a slow machine
    assert "not measured" in lines[-1] and len(runs) <= 13  # progress, then one line
    assert cli("report", tmp_path).code == 0
    page = (tmp_path / "report.md").read_text()
    assert "Not measured" in page and "times as much" not in page


@pytest.fixture(scope="module")
def audit(originals, locks, tmp_path_factory):
    """A small audit of a lock, by three kinds of attacks and one script."""
    out = tmp_path_factory.mktemp("audit")
    attacks = ["full-ft", "lora", "frozen-dlr", "corrected-stack", "hf-full"]
    config = audit_config("quick", **TINY)
    run_audit(str(locks("qwen3")), str(originals("qwen3")), out, config, attacks)
    return out


def test_every_ratio_can_be_recomputed_from_the_runs_beside_it(audit):
    record = json.loads((audit / "summary.json").read_text())
    summary = read_summary(record)
    assert summary.record() == record
    figures = summary.tasks["signatures"]
    runs = {run.id: run for run in figures.runs}
    rows = [json.loads(line) for line in (audit / "rows.jsonl").read_text().splitlines()]
    for kind in ("amplification", "off_the_shelf"):
        for resource, found in getattr(figures, kind).items():
            ends = runs[found.locked_run], runs[found.original_run]
            assert [end.model for end in ends] == ["locked", "original"]
            costs = [getattr(end.spent, resource) for end in ends]
            assert costs == [found.locked, found.original]
            assert found.value == pytest.approx(costs[0] / costs[1])
    for line in figures.attacks:
        for run in (line.original, line.locked):
            if run is not None:  # loss and costs are those of one row
                (row,) = (row for row in rows if row["key"].startswith(run.id))
                assert row["best_loss"] == run.best_loss and row["model"] == run.model
    named = {name: model.named for name, model in summary.models.items()}
    assert named == {"locked": {"lockkit.json": "qwen3"}, "original": {}}
    assert [(model.depth, model.layers) for model in summary.models.values()] == [(None, 2), (5, 2)]
    script = {line.attack: line.kind for line in figures.attacks}
    assert script["hf-full"] == "off the shelf" and script["full-ft"] == "informed"
    assert all(run.general_perplexity_ratio > 0 for run in runs.values())
    assert all(run.seconds_spread[0] <= 1 <= run.seconds_spread[1] for run in runs.values())


def test_the_page_has_the_verdict_both_ends_of_each_ratio_and_the_runs_of_the_headline(audit, cli):
    assert cli("report", audit).code == 0
    summary = read_summary(json.loads((audit / "summary.json").read_text()))
    sections = json.loads((audit / "report.json").read_text())["sections"]
    assert sections[0]["warning"] == summary.verdict.sentence
    said = [text for section in sections for text in section["text"]]
    assert summary.verdict.rules and all(any(rule in text for text in said) for rule in summary.verdict.rules)
    figures = summary.tasks["signatures"]
    found = figures.amplification["flops"]
    curve = next(c for s in sections for c in s["curves"] if c["across"] == "floating-point operations")
    rows = [json.loads(line) for line in (audit / "rows.jsonl").read_text().splitlines()]
    for name, run_id in (
        (f"cheapest: {found.best_attack}", found.locked_run),
        (f"original's cheapest: {found.best_attack_original}", found.original_run),
    ):
        (row,) = (row for row in rows if row["key"].startswith(run_id))
        assert curve["lines"][name] == [[p["flops"], p["loss"]] for p in row["curve"] if p["step"]]
    page = (audit / "report.md").read_text()
    assert found.locked_run in page and found.original_run in page and found.says in page
    assert summary.adversary in page and "Not tried:" in page


def test_the_example_of_the_documentation_is_replaced_by_another_audits(audit, tmp_path, monkeypatch):
    page = tmp_path / "audit.md"
    page.write_text((ROOT / "docs" / "audit.md").read_text())
    summary = read_summary(json.loads((audit / "summary.json").read_text()))
    for note in ("first", "second"):
        arguments = [str(audit / "summary.json"), "--note", note, "--document", str(page)]
        monkeypatch.setattr("sys.argv", ["quote_audit.py", *arguments])
        runpy.run_path(str(ROOT / "tools" / "quote_audit.py"), run_name="__main__")
    found, text = summary.tasks["signatures"].amplification["flops"], page.read_text()
    unwrapped = " ".join(text.replace("\n> ", "\n").split())
    assert summary.verdict.sentence in unwrapped and "; second) says:" in unwrapped and "first) says" not in unwrapped
    assert f"{found.best_attack}: {found.locked / 1e9:,.0f} GFLOP" in unwrapped and found.says in unwrapped
    assert summary.tasks["signatures"].attention_only_bound["flops"].says in unwrapped
    assert text.startswith("# The audit") and text.endswith((ROOT / "docs" / "audit.md").read_text()[-500:])


def test_several_audits_are_compared_in_one_table(audit, cli, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    summary = json.loads((audit / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"locked": "the other"}))
    assert cli("report", audit, other, "--out", tmp_path / "both.html").code == 0
    sections = json.loads((tmp_path / "both.json").read_text())["sections"]
    assert sections[0]["title"] == "2 audits compared"
    heads, first = sections[0]["tables"][1]["head"], sections[0]["tables"][1]["rows"][0]
    assert heads[1:] == [summary["locked"], "the other"] and first[0] == "full-ft" and first[1] == first[2] != "–"


def test_audits_of_locks_with_the_same_name_are_told_apart(audit, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("audit-a", "audit-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_bytes((audit / "summary.json").read_bytes())
    assert cli("report", "audit-a", "audit-b", "--out", "both.html").code == 0
    sections = json.loads((tmp_path / "both.json").read_text())["sections"]
    name = json.loads((audit / "summary.json").read_text())["locked"]
    both = [f"{name} (audit-a)", f"{name} (audit-b)"]
    assert sections[0]["tables"][1]["head"][1:] == [row[0] for row in sections[0]["tables"][0]["rows"]] == both
    assert [text.partition(":")[0] for text in sections[0]["text"][:2]] == both
    assert [s["title"] for s in sections if s["title"].startswith("Audit of")] == [f"Audit of {n}" for n in both]
    assert cli("report", tmp_path / "audit-a", tmp_path / "audit-b", "--out", "both.html").code == 0
    assert str(tmp_path) not in (tmp_path / "both.html").read_text()
    assert cli("report", "audit-a", "audit-a/summary.json", "--out", "one.html").code == 0
    titles = [section["title"] for section in json.loads((tmp_path / "one.json").read_text())["sections"]]
    assert titles[0] == f"Audit of {name}" and titles.count(titles[0]) == 1


def test_ratios_stand_nowhere_if_the_audit_lacks_attacks(audit, cli, tmp_path):
    """And where they stand, that of operations, from which the verdict follows, is first."""
    record = json.loads((audit / "summary.json").read_text())
    assert cli("report", audit, "--out", tmp_path / "full.html").code == 0
    sections = {s["title"]: s for s in json.loads((tmp_path / "full.json").read_text())["sections"]}
    assert sections["What an attacker pays"]["tables"][0]["rows"][0][0] == "floating-point operations, GFLOP"
    assert "floating-point operations" in audit_results(record).text and audit_results(record).index
    record["verdict"] |= {"level": "not measured", "sentence": "Not measured.", "missing": ["the baseline"]}
    (tmp_path / "summary.json").write_text(json.dumps(record))
    assert cli("report", tmp_path / "summary.json").code == 0
    page, card = (tmp_path / "report.md").read_text(), audit_results(record)
    assert "Not measured" in page and "Not measured" in card.text and not card.index
    assert "times as much" not in page + card.text and "lacks the baseline" in page


def test_a_recipe_runs_its_attack_again(audit, cli, originals, locks, tmp_path):
    recipe = json.loads((audit / "recipe.json").read_text())
    command = ["attack", locks("qwen3"), "--original", originals("qwen3"), "--out", tmp_path / "again"]
    outcome = cli(*command, "--recipe", audit / "recipe.json")
    assert outcome.code == 0, outcome.err
    (row,) = (json.loads(line) for line in (tmp_path / "again" / "rows.jsonl").read_text().splitlines())
    assert row["config"] == recipe["settings"] and row["attack"] == recipe["attack"]
    assert f"after {recipe['tokens']:,.0f} tokens; in the recipe after {recipe['tokens']:,.0f}" in " ".join(
        outcome.out.split()
    )
    assert "leave out --steps" in cli(*command, "--recipe", audit / "recipe.json", "--steps", "8").err
    assert "change --recipe" in cli(*command, "--recipe", audit / "summary.json").err


def noised(folder, out, share: float):
    """The model in `folder` with noise on its MLPs, in `out`: a model that lockkit did not make."""
    model, _ = load_model(folder, torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in decoder_layers(model):
            for weight in layer.mlp.parameters():
                weight.add_(torch.randn_like(weight) * weight.std() * share)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


def test_two_models_that_lockkit_did_not_make(originals, tmp_path, cli):
    original = originals("qwen3")
    hardened = noised(original, tmp_path / "hardened", 0.5)
    (hardened / "README.md").write_text(f"---\nbase_model: [example/tiny-qwen, {original}]\n---\n")
    config = json.loads((hardened / "config.json").read_text())
    (hardened / "config.json").write_text(json.dumps(config | {"_name_or_path": str(original)}))
    command = ["attack", hardened, "--original", original, "--out", tmp_path / "audit", *options(TINY)]
    outcome = cli(*command, "--attack", "full-ft", "--attack", "frozen-dlr", "--attack", "corrected-stack")
    assert outcome.code == 0, outcome.err
    summary = read_summary(json.loads((tmp_path / "audit" / "summary.json").read_text()))
    assert not summary.has_chains and not summary.unlocks and "This model gives" in summary.verdict.sentence
    assert any(name.startswith("corrected-stack (it needs chains") for name in summary.not_tried)
    assert summary.tasks["signatures"].amplification["tokens"].value > 0
    what = audited_sentence(summary)
    assert "Audited: hardened (its card names example/tiny-qwen, family qwen3, " in what
    assert "layers, weights in float32), compared with qwen3 (family qwen3, " in what
    assert cli("report", tmp_path / "audit").code == 0
    page = (tmp_path / "audit" / "report.html").read_text()
    assert what in page.partition("<main>")[0] and what in " ".join(outcome.out.split())  # at the beginning of both
    written = page + outcome.out + (tmp_path / "audit" / "summary.json").read_text()
    assert str(original.parent) not in written and str(tmp_path) not in written.replace(f"wrote {tmp_path}", "")
    only = cli(*command[:5], tmp_path / "b", *options(TINY), "--attack", "stack-solve")
    assert only.code == 2 and "change --attack" in only.err


def test_a_model_costs_as_much_as_itself_and_a_target_can_be_given(originals, tmp_path):
    original = str(originals("qwen3"))
    config = audit_config("quick", **TINY)
    summary = run_audit(original, original, tmp_path / "a", config, ["full-ft", "frozen-dlr"])
    figures = summary["tasks"]["signatures"]
    assert all(figures["amplification"][key]["value"] == 1 for key in ("tokens", "flops", "saved_bytes"))
    loss = (figures["start_loss"] + figures["reference_loss"]) / 2
    again = run_audit(original, original, tmp_path / "b", config.model_copy(update={"target_loss": loss}), ["full-ft"])
    assert again["tasks"]["signatures"]["target_loss"] == loss


def test_factors_out_of_scale_mask_gradients_and_fall_to_reparametrise(originals, locks):
    subjects = Subjects(str(locks("qwen3")), str(originals("qwen3")), audit_config("quick", **TINY))
    task = subjects.tasks["signatures"]

    def masked():
        model = subjects.load("locked")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in decoder_layers(model):
                for block in layer.mlp.blocks:
                    rows = len(block.up_proj.weight)
                    scale = 2.0 ** torch.randint(-7, 8, (rows,), generator=generator)
                    block.up_proj.weight.mul_(scale[:, None])
                    block.down_proj.weight.div_(scale)
        return model

    def best(attack, model) -> float:
        return attack(attack.Config(steps=16, batch_rows=2, learning_rate=3e-3)).run(model, subjects, task).best

    plain, hidden = best(FullFinetune, subjects.load("locked")), best(FullFinetune, masked())
    undone, before = best(Reparametrise, masked()), best(Reparametrise, subjects.load("locked"))
    assert undone == pytest.approx(before, abs=0.02)  # the scales are gone
    assert abs(undone - before) < 0.2 * abs(hidden - plain)


def test_an_attack_of_another_package_is_found_and_run(cli, originals, tmp_path, monkeypatch):
    package = tmp_path / "site"
    record = package / "head_attack-1.0.dist-info"
    record.mkdir(parents=True)
    section = (ROOT / "docs" / "audit.md").read_text().partition("## Your own attack")[2].partition("\n## ")[0]
    toml, code = (re.search(f"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("toml", "python"))
    (entries,) = tomllib.loads(toml)["project"]["entry-points"].values()
    (package / "head_attack.py").write_text(code)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: head-attack\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(
        "".join(["[lockkit.attacks]\n", *(f"{name} = {where}\n" for name, where in entries.items())])
    )
    monkeypatch.syspath_prepend(str(package))
    registry.cache_clear()
    try:
        assert "only-the-head" in cli("attack", "--list").out
        original = str(originals("qwen3"))
        summary = run_audit(
            original, original, tmp_path / "a", audit_config("quick", **TINY), ["full-ft", "only-the-head"]
        )
        line = summary["tasks"]["signatures"]["attacks"][-1]
        assert line["attack"] == "only-the-head" and line["trials_locked"] == 1
        (record / "entry_points.txt").write_text("[lockkit.attacks]\nbroken = head_attack:Nothing\n")
        registry.cache_clear()
        outcome = cli("attack", "--list")
        assert outcome.code == 2 and "'broken' of another package cannot be loaded" in outcome.err
    finally:
        registry.cache_clear()
