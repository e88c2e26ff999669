"""Several audits in one table: what each attack costs on each model."""

from __future__ import annotations

from pathlib import Path

from lockkit.attack.record import OLD_SCHEMA, SCHEMA, AttackLine, Summary, read_summary
from lockkit.attack.sentences import KINDS, times
from lockkit.attack.target import RESOURCE_TITLES as RESOURCES
from lockkit.report.page import Section, Table, number
from lockkit.report.sections import compares, told_apart

SCALE = ((1.5, "·"), (3.0, "▪"), (10.0, "▪▪"))  # below: the mark; at or above the last: three


@compares(SCHEMA, OLD_SCHEMA)
def compared_audits(results: list[tuple[dict, Path]]) -> list[Section]:
    """Verdicts, headlines, and a table of attacks by model."""
    audits = [read_summary(record) for record, _ in results]
    names = told_apart([(audit.locked, path) for audit, (_, path) in zip(audits, results, strict=True)])
    section = Section(f"{len(audits)} audits compared")
    section.text = [f"{name}: {audit.verdict.sentence}" for name, audit in zip(names, audits, strict=True)]
    head = ["model", "original", "perplexity, over the original's"]
    head += [
        f"{RESOURCES[key]}: {kind}" for kind in ("all attacks", "scripts off the shelf") for key in ("flops", "tokens")
    ]
    section.tables.append(Table(head, [_line(*named) for named in zip(names, audits, strict=True)]))
    section.text.append(
        "The second table has the operations of each attack to the target on a model, over those of the cheapest attack on "
        "its original: · below 1.5, ▪ below 3, ▪▪ below 10, ▪▪▪ above. A dash: not run, invalid, or of an audit without a verdict; > budget: not reached."
    )
    by_task = {task for audit in audits for task in audit.tasks}
    for task in sorted(by_task):
        attacks = dict.fromkeys(
            line.attack for audit in audits if task in audit.tasks for line in audit.tasks[task].attacks
        )
        rows = [[attack, *(_cell(audit, task, attack) for audit in audits)] for attack in attacks]
        section.tables.append(Table([f"attack, on {task}", *names], rows))
    return [section]


def _line(name: str, audit: Summary) -> list[str]:
    cells = [name, audit.original, number(audit.quality["perplexity_ratio"], ".4f")]
    if audit.verdict.missing:
        return cells + ["not measured"] * 4
    for kind in list(KINDS)[:2]:
        for key in ("flops", "tokens"):
            found = [value for task in audit.tasks.values() if (value := getattr(task, kind).get(key))]
            known = [value.value for value in found if value.value is not None]
            cells.append(times(min(known)) if known else found[0].says if found else "–")
    return cells


def _cell(audit: Summary, task: str, attack: str) -> str:
    if audit.verdict.missing:
        return "–"
    figures = audit.tasks.get(task)
    line: AttackLine | None = (
        next((line for line in figures.attacks if line.attack == attack), None) if figures else None
    )
    base = figures.amplification.get("flops") if figures else None
    if line is None or not line.valid or line.locked is None or base is None or not base.original:
        return "–"
    if line.locked.spent is None:
        return "> budget"
    value = line.locked.spent.flops / base.original
    mark = next((mark for limit, mark in SCALE if value < limit), "▪▪▪")
    return f"{times(value)} {mark}"
