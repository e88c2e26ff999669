"""The plots of a report: which lines they have, and that each looks the same wherever it stands."""

from __future__ import annotations

import re

import pytest

from lockkit.attack.base import Probe
from lockkit.attack.record import Amplification, AttackLine, Run, TaskSummary
from lockkit.attack.registry import registry
from lockkit.attack.target import RESOURCES
from lockkit.report.attack_styles import GROUPS, OTHERS, group_of, in_order, style_of
from lockkit.report.page import MOST_LINES, Curve, Section
from lockkit.report.plot import svg
from lockkit.report.sections.audit_curves import ON_LOCK, ON_ORIGINAL, add_loss_plots

pytest.importorskip("matplotlib", reason="pip install lockkit[report]")
ATTACKS = [name for name, attack in registry().items() if not issubclass(attack, Probe)]
AFTER = [f"corrected-stack, then {name}" for name in ("lora", "lomo", "checkpointing", "hf-full")]


def task(attacks: list[str], cheapest: str) -> tuple[TaskSummary, dict[str, dict]]:
    """The figures of a task, and its rows: one run of each attack on each model."""
    rows, lines = {}, []
    for place, name in enumerate(attacks):
        runs = {}
        for model in ("original", "locked"):
            run_id = f"{model}-{place:03}"
            curve = [{"step": s, "tokens": s * 10, "flops": s * 1e9, "loss": 3 - s / (9 + place)} for s in (0, 1, 2, 4)]
            rows[run_id] = {"key": run_id, "curve": curve}
            runs[model] = Run.model_construct(id=run_id, attack=name, model=model, spent=None)
        lines.append(AttackLine.model_construct(attack=name, valid=name != "mezo", **runs))
    (best,) = (line for line in lines if line.attack == cheapest)
    ratio = Amplification(
        value=1, says="", best_attack=cheapest, best_attack_original=cheapest, locked_run=best.locked.id,
        original_run=best.original.id,
    )  # fmt: skip
    figures = TaskSummary.model_construct(attacks=lines, amplification=dict.fromkeys(RESOURCES, ratio), target_loss=2.5)
    return figures, rows


def plots(attacks: list[str], cheapest: str) -> Section:
    section = Section("Attacks")
    add_loss_plots(section, *task(attacks, cheapest))
    return section


def test_every_attack_of_lockkit_has_a_place_in_one_group_and_looks_like_no_other_in_it():
    assert [name for name in ATTACKS if group_of(name) == OTHERS] == []
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(ATTACKS)
    for group in GROUPS.values():
        assert (
            len({style_of(name).colour for name in group})
            == len({style_of(name).marker for name in group})
            == len(group)
        )
    assert len({style_of(name) for name in (*AFTER, "corrected-stack")}) == len(AFTER) + 1
    assert {style_of(name).colour for name in AFTER} == {style_of("corrected-stack").colour}
    assert style_of("of another package") == style_of("of another package")


def test_every_attack_that_ran_on_the_lock_is_in_a_plot_and_the_headline_in_all():
    section = plots([*ATTACKS, *AFTER, "of another package"], "lora")
    for across in ("tokens", "floating-point operations"):
        curves = [curve for curve in section.curves if curve.across == across]
        lines = [name for curve in curves for name in curve.lines]
        ends = [f"{ON_ORIGINAL}lora", f"{ON_LOCK}lora"]
        shown = [name.removesuffix(" (invalid)") for name in lines if name not in ends]
        assert sorted(shown) == sorted({*ATTACKS, *AFTER, "of another package"} - {"lora"})
        assert "mezo (invalid)" in lines
        assert all([*curve.dashed, *curve.thick] == ends and set(ends) <= curve.lines.keys() for curve in curves)
        assert all(len(curve.lines) <= MOST_LINES + 2 for curve in curves)
        assert len({tuple(curve.frame) for curve in curves}) == 1
    titles = [curve.title for curve in section.curves]
    assert len(titles) == len(set(titles)) and "Unlocks (2 of 2): tokens" in titles


def test_an_attack_looks_the_same_whatever_ran_beside_it_and_whichever_was_cheapest():
    few, many = ["hf-full", "lora", "checkpointing"], [*reversed(ATTACKS)]
    found = [
        {
            name.removeprefix(ON_LOCK): style
            for curve in plots(attacks, best).curves
            for name, style in curve.styles.items()
        }
        for attacks, best in ((few, "lora"), (few, "hf-full"), (many, "mezo"))
    ]
    assert found[0] == found[1] == {name: found[2][name] for name in few}
    assert in_order(few) == in_order(few[::-1])


def test_runs_without_losses_are_named():
    figures, rows = task(["full-ft", "lora"], "full-ft")
    del rows["locked-001"]
    section = Section("Attacks")
    add_loss_plots(section, figures, rows)
    assert section.text[-1] == "Not in the plots, because rows.jsonl has no losses of their runs: lora."
    empty = Section("Attacks")
    add_loss_plots(empty, figures, {})
    assert not empty.curves and empty.text == ["No plots: rows.jsonl has no losses of these runs."]


def test_a_group_that_has_only_the_headline_s_attack_has_no_plot_of_its_own():
    assert {curve.title.partition(":")[0] for curve in plots(["full-ft", "lora"], "full-ft").curves} == {
        "Fewer weights"
    }
    assert [curve.title for curve in plots(["full-ft"], "full-ft").curves] == [
        "All weights: tokens",
        "All weights: floating-point operations",
    ]


def test_an_invalid_attack_does_not_stretch_the_axes_of_the_others():
    figures, rows = task(["full-ft", "lora", "mezo"], "full-ft")
    rows["locked-002"]["curve"][-1]["loss"] = 1e6
    section = Section("Attacks")
    add_loss_plots(section, figures, rows)
    reached = {curve.title: max(loss for _, loss in curve.frame) for curve in section.curves}
    assert len(reached) == 4 and max(reached.values()) < 3
    assert any((40, 1e6) in points for curve in section.curves for points in curve.lines.values())


def test_lines_differ_by_more_than_colour_and_all_are_in_the_legend():
    lines = {f"line {place} " + "x" * place: [(1.0, place), (2.0, place + 1)] for place in range(12)}
    texts = {}
    for shown in ("all", "one"):
        chosen = lines if shown == "all" else {"only": lines["line 0 "]}
        texts[shown] = svg(Curve("Title", "across", "up", chosen), "0")
    assert "<!-- line 0 -->" in texts["all"] and f"<!-- line 11 {'x' * 11} -->" in texts["all"]
    assert "<!-- only -->" not in texts["one"]  # the title says what it is
    markers = re.findall(r'<path id="(p0-m\w+)" d="([^"]+)" style="stroke: var\(--c', texts["all"])
    assert len({shape for _, shape in markers}) == MOST_LINES
    assert "stroke-dasharray" in texts["all"]
