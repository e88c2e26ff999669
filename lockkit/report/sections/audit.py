"""An audit in a report: verdict, both kinds of attackers, attacks, unlocks, searches, limits.

All figures are taken from the summary (lockkit/attack/summary.py); none is computed here. Curves are the runs of the
summary, from the file rows.jsonl beside it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from lockkit.attack.audited import audited_sentence
from lockkit.attack.record import OLD_SCHEMA, SCHEMA, Amplification, AttackLine, Run, Summary, TaskSummary, read_summary
from lockkit.attack.sentences import ATTENTION_ONLY_BOUND, CONSEQUENCE, KINDS, LACKS, ONE_SEED, QUICK, TASKS, UNCOUNTED
from lockkit.attack.target import RESOURCE_TITLES as RESOURCES
from lockkit.attack.verdict import PRICE, lowest
from lockkit.errors import UsageError
from lockkit.files import complete_lines
from lockkit.report.page import Section, Stack, Table, measured_on, number
from lockkit.report.sections import reports
from lockkit.report.sections.audit_curves import add_loss_plots
from lockkit.report.sections.audit_parts import facts, first_run, layers, searches, terms, unlocks

UNITS = {"tokens": 1, "flops": 1e9, "seconds": 1}  # divisors; all others are shown in MB
_IN_UNITS = {"flops": ", GFLOP", "peak_tensor_bytes": ", MB", "saved_bytes": ", MB"}
UNIT_NAMES = {"flops": "GFLOP", "seconds": "seconds", "peak_tensor_bytes": "peak MB", "saved_bytes": "saved MB"}


@reports(SCHEMA, place=0)
def audit_sections(record: dict, path: Path) -> list[Section]:
    """The sections from summary.json and the rows beside it.

    Raises:
        UsageError: the rows are broken.
    """
    summary = read_summary(record)
    file = path.with_name("rows.jsonl")
    written = _written(file)
    rows = {row["key"]: row for row in written}
    rows = {key: rows[key] for key in summary.row_keys if key in rows}
    found = [_headline(summary), _attackers(summary)]
    found[0].notes = _stale(summary, written, file)
    found += [_task(summary, task, figures, rows) for task, figures in summary.tasks.items()]
    optional = [unlocks(summary), terms(summary), layers(summary), searches(summary)]
    limits = _limits(summary)
    limits.facts = facts(summary, record)
    return [*found, *(section for section in optional if section is not None), limits]


@reports(OLD_SCHEMA, place=-1)
def old_audit_sections(record: dict, path: Path) -> list[Section]:
    """The same from a summary of an earlier version, with a sentence on what it lacks."""
    found = audit_sections(record, path)
    found[0].text.append(LACKS)
    return found


def _written(file: Path) -> list[dict]:
    """All rows of a file, in the order in which they were written; also those from other settings."""
    rows: list[dict] = []
    for count, line in enumerate(complete_lines(file) if file.is_file() else [], 1):
        try:
            row = json.loads(line)
            hash(row["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file}, line {count}, is not a row ({error}): remove it, or change RESULTS") from error
        rows.append(row)
    return rows


def _stale(summary: Summary, written: list[dict], file: Path) -> list[str]:
    """That the summary is older than the last rows, if it is: the audit was run again, and did not end."""
    if summary.rows_written is None:
        return []
    newer = len({row["key"] for row in written[summary.rows_written :]})
    if not newer:
        return []
    runs = "1 run of {} is" if newer == 1 else f"{newer} runs of {{}} are"
    return [
        f"{runs.format(file.name)} newer than summary.json, and not counted: run the same audit again to count them."
    ]


def _headline(summary: Summary) -> Section:
    quality = summary.quality
    section = Section(f"Audit of {summary.locked}", about=audited_sentence(summary), warning=summary.verdict.sentence)
    section.figures = [
        ("perplexity of the lock, over the original's", number(quality["perplexity_ratio"], ".4f")),
        ("KL divergence from original to lock, nats per token", number(quality["locked"]["kl_to_original"], ".5f")),
    ]
    if not summary.verdict.missing:
        best = lowest(summary.tasks, "amplification")
        section.figures += [(f"{RESOURCES[key]}, {_by(found)}", found.says) for key, found in best.items()]
    section.text = [measured_on(quality.get("fidelity", {}).get("text")), CONSEQUENCE]
    return section


def _by(found: Amplification) -> str:
    return f"cheapest attack: {found.best_attack}" if found.best_attack else "cheapest attack"


def _attackers(summary: Summary) -> Section:
    """The ratios of both kinds of attackers, each with the two runs that it is computed from."""
    section = Section("What an attacker pays", part=True)
    section.text.append(
        f"Cost to reach the target, a held-out loss{_share(summary)}: of the cheapest run on the lock, over the cheapest on "
        "the original. The cheapest runs of two resources can be of two attacks. Each ratio is the cost on the lock divided by "
        "the cost on the original beside it. Losses are measured every few steps, and costs between two of them are "
        "interpolated. A run is named by its attack and the first characters of its key in rows.jsonl. Budget: "
        f"{summary.budget}. The verdict follows from the ratio of {RESOURCES[PRICE]}. A range behind a ratio of seconds is that "
        "of the times of steps within the two runs."
    )
    section.text += [QUICK] if summary.config.get("suite") == "quick" else []
    section.text += [ONE_SEED] if summary.config.get("seeds") == 1 else []
    section.text += first_run(summary)
    if summary.verdict.missing:
        section.text = [f"Ratios of costs are left out, because the audit lacks {'; '.join(summary.verdict.missing)}."]
        return section
    for kind, title in KINDS.items():
        for task, figures in summary.tasks.items():
            rows = [
                [
                    RESOURCES[key] + _IN_UNITS.get(key, ""),
                    found.says,
                    _end(found, key, "locked"),
                    _end(found, key, "original"),
                    _seeds(found),
                ]
                for key in RESOURCES
                if (found := getattr(figures, kind).get(key))
            ]
            head = [f"{title}, on {task}", "ratio", "cost on the lock", "cost on the original", "over seeds"]
            section.tables.append(Table(head, rows))
    rise = summary.config.get("utility_rise")
    if rise:
        section.text.append(
            f"A run keeps the model's utility if the perplexity on general text is afterwards at most {rise:g} times that of "
            "the model before."
        )
        if not any(found for figures in summary.tasks.values() for found in figures.within_utility.values()):
            section.text.append(
                "No run on the original that reached the target kept its utility, so there is no ratio for such runs."
            )
    return section


def _share(summary: Summary) -> str:
    """Which loss the target is."""
    share = summary.config.get("target_share")
    if share is None or summary.config.get("target_loss") is not None:
        return ""
    return f" after {share:.0%} of the improvement that the reference fine-tune brings on the original"


def _end(found: Amplification, resource: str, model: str) -> Stack:
    """The cost of one model, above the run that it is of."""
    name = found.best_attack if model == "locked" else found.best_attack_original
    run, cost = getattr(found, f"{model}_run"), getattr(found, model)
    return Stack(_cost(cost, resource), f"{name or '–'}" + (f", {run}" if run else ""))


def _cost(value: float | None, resource: str) -> str:
    if value is None:
        return number(None)
    value /= UNITS.get(resource, 1e6)
    return number(value, ",.0f" if value >= 100 or resource == "tokens" else ".1f" if value >= 10 else ".2f")


def _seeds(found: Amplification) -> str:
    """Mean and spread of a ratio over seeds."""
    seeds = found.seeds
    if not seeds:
        return "one seed"
    missed = seeds.seeds - seeds.reached["locked"]
    return f"{seeds.seeds} seeds: mean {seeds.mean:.2f}, {seeds.lowest:.2f} to {seeds.highest:.2f}" + (
        f"; {missed} did not reach the target" if missed else ""
    )


def _task(summary: Summary, task: str, figures: TaskSummary, rows: dict[str, dict]) -> Section:
    section = Section(f"Attacks on the task {task}", part=True)
    count = figures.left_out_as_distillation_text
    section.text += [f"{task}: {TASKS[task]}."] if task in TASKS else []
    section.text.append(
        f"Held-out loss of the original: {figures.start_loss:.3f}; after the reference fine-tune: "
        f"{figures.reference_loss:.3f}; target {figures.target_loss:.3f}. A line shows one run on each model: the cheapest to "
        "the target in operations, or the one with the lowest loss. In each cell, the original's run is above the lock's. "
        "Trained parameters are in millions. General perplexity is that on general text after the run, over that before. "
        f"{'1 document was' if count == 1 else f'{count} documents were'} left out because "
        f"{'it is' if count == 1 else 'they are'} part of the distillation text. SHA-256 of training rows: "
        f"{figures.train_sha256[:12]}, of held-out rows: {figures.held_out_sha256[:12]}."
    )
    section.text += [] if summary.verdict.missing else _attention_only(figures)
    head = [
        "attack",
        "control",
        "runs",
        "loss",
        "tokens",
        *UNIT_NAMES.values(),
        "trained, M",
        "general perplexity",
        "run",
    ]
    section.tables.append(Table(head, [_cells(line) for line in figures.attacks]))
    add_loss_plots(section, figures, rows)
    return section


def _attention_only(figures: TaskSummary) -> list[str]:
    """A paragraph on the attention-only bound, if it was measured."""
    bounds = {RESOURCES[key]: found for key, found in figures.attention_only_bound.items() if found and found.value}
    if not bounds:
        return []
    said = ", ".join(f"{found.value:.1f} times in {name}" for name, found in bounds.items() if found)
    return [f"Bound for this task, {said}: {ATTENTION_ONLY_BOUND}. This is a figure of one run, too."]


def _cells(line: AttackLine) -> list[str]:
    control = line.says or ("valid" if line.valid else "–")
    if line.control_won_back is not None:
        control = Stack(control, f"{max(0.0, line.control_won_back):.0%} recovered")
    runs = (line.original, line.locked)

    def pair(cell: Callable[[Run], str]) -> Stack:
        return Stack(*(cell(run) if run else "–" for run in runs))

    return [
        Stack(line.attack, line.kind) if line.kind else line.attack,
        control,
        Stack(number(line.trials_original), number(line.trials_locked)),
        pair(lambda run: number(run.best_loss, ".3f")),
        *(pair(functools.partial(_spent, resource)) for resource in ("tokens", *UNIT_NAMES)),
        pair(lambda run: number(None if run.trained_parameters is None else run.trained_parameters / 1e6, ".2f")),
        pair(lambda run: number(run.general_perplexity_ratio, ".2f")),
        pair(lambda run: run.id),
    ]


def _spent(resource: str, run: Run) -> str:
    if run.spent is None:
        return "> budget" if resource == "tokens" else "–"
    return _cost(getattr(run.spent, resource), resource)


def _limits(summary: Summary) -> Section:
    runs = summary.runs
    section = Section("Assumptions and limits", part=True)
    tried = ", ".join(f"{count} {status}" for status, count in runs["by_status"].items())
    section.text = [
        *(f"Rule of the verdict. {rule}" for rule in summary.verdict.rules),
        f"Adversary: {summary.adversary}.",
        f"Budget: {summary.budget}.",
        f"These figures would be falsified by {summary.falsified_by}.",
        "Not tried: " + ("; ".join(summary.not_tried) or "none; all attacks of lockkit were run") + ".",
        *(["lockkit attack --list says what each attack does."] if summary.not_tried else []),
        f"{runs['rows']} runs ({tried}).",
        *(
            [f"{reused} of them, on the original, are from other audits."]
            if (reused := runs["reused_from_controls"])
            else []
        ),
        *([UNCOUNTED] if summary.rows_written is None else []),
    ]
    head = ["run", "on", "task", "ended", "note"]
    rows = [
        [row["attack"], row["model"], row["task"] or "–", row["status"], row["note"] or "–"]
        for row in runs["not_finished"]
    ]
    section.tables.append(Table(head, rows))
    does = {line.attack: line.description for figures in summary.tasks.values() for line in figures.attacks}
    section.tables.append(Table(["attack", "what it does"], [[name, text] for name, text in does.items() if text]))
    probes = [[row["attack"], _settings(row["config"]), _outcome(row)] for row in summary.probes]
    section.tables.append(Table(["measured on the lock", "settings", "outcome"], probes))
    return section


def _settings(config: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items()) or "–"


def _outcome(row: dict) -> str:
    if row["status"] != "finished":
        return f"{row['status']}: {row['note']}"
    if "held_out" in row:
        return "; ".join(
            f"{task}: loss {number(found['original'], '.3f')} (original), {number(found['locked'], '.3f')} (lock)"
            for task, found in row["held_out"].items()
        )
    verdict = "measured"
    if row.get("passed") is not None:
        verdict = "the weights were recovered" if row["passed"] else "not recovered"
    return verdict + (f" (NMSE of logits {number(row['logits_nmse'], '.1e')})" if "logits_nmse" in row else "")
