"""`lockkit attack`: audit a lock, or another hardened model, by what it adds to the cost of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.attack.config import AuditConfig, audit_config
from lockkit.attack.sentences import ATTENTION_ONLY_BOUND, KINDS, NOT_MEASURED
from lockkit.attack.target import NOT_FINITE, RESOURCE_TITLES
from lockkit.cli.console import TerminalProgress, console, figures_table
from lockkit.cli.options import Given
from lockkit.errors import GateFailed, UsageError
from lockkit.settings import option_of

if TYPE_CHECKING:
    from rich.table import Table

    from lockkit.attack.record import Amplifications, Run, Summary, TaskSummary


def attack(
    locked: Annotated[
        str | None,
        typer.Argument(
            metavar="LOCKED", help="Folder that `lockkit lock` wrote, or any model hardened in another way."
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="Model that LOCKED was made from: `demo`, a folder, or a Hub id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results. An audit that is already there is resumed.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--attack", help="Run this attack only. Default: those of the suite.")
    ] = None,
    controls: Annotated[
        list[Path] | None,
        typer.Option(
            "--controls",
            help="Folder of another audit. Its results for the original are reused where settings and text match.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Run only the attack of this recipe.json, which an audit wrote, on LOCKED."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print all attacks and exit.")] = False,
    *,
    given: Given[AuditConfig],
) -> None:
    """Attack LOCKED and compare the cost with that of the original.

    Each attack first runs on the original (positive control). The --out folder gets `rows.jsonl`,
    with one row per run, and `summary.json`, with the figures. If the audit is interrupted, run the
    same command again to resume it. Exit code 1: the audit could not measure what the lock costs.

    Examples:

    \b
        lockkit attack --list
        lockkit attack ./locked --original demo --out audit
        lockkit attack ./locked --original demo --out audit \\
            --attack full-ft --attack stack-solve --attack lora
        lockkit attack ./locked --original demo --out new --recipe recipe.json
    """
    if list_:
        _print_list()
        return
    if locked is None or original is None or out is None:
        needed = {"LOCKED": locked, "--original MODEL": original, "--out DIR": out}
        missing = next(what for what, value in needed.items() if value is None)
        raise UsageError(f"{missing} is missing: lockkit attack LOCKED --original MODEL --out DIR")
    if recipe is not None:
        if name or controls:
            raise UsageError(f"--recipe names its attack: leave out {'--attack' if name else '--controls'}")
        _rerun(recipe, locked, original, out, given)
        return
    if {"target_loss", "target_share"} <= given.keys():
        raise UsageError("--target-share has no effect with --target-loss: leave out one of them")
    config = audit_config(**given)

    from lockkit.attack.record import read_summary
    from lockkit.attack.run import run_audit

    with TerminalProgress() as progress:
        summary = read_summary(run_audit(locked, original, out, config, name, controls, progress))
    _print(summary)
    console.print(f"wrote {out}: rows.jsonl, summary.json, recipe.json and the unlocked models", soft_wrap=True)
    if summary.verdict.level == NOT_MEASURED:
        raise GateFailed(f"{NOT_MEASURED}: {'; '.join(summary.verdict.missing)} is missing")


def _rerun(path: Path, locked: str, original: str, out: Path, given: Given[AuditConfig]) -> None:
    from lockkit.attack.recipe import outcome, read_recipe
    from lockkit.attack.run import rerun

    recipe = read_recipe(path)
    if other := set(given) - {"device"}:
        name = option_of(AuditConfig, min(other))
        raise UsageError(f"--recipe has its own settings: leave out {name}")
    with TerminalProgress() as progress:
        row = rerun(recipe, locked, original, out, progress, given.get("device", "auto"))
    console.print(outcome(recipe, row), soft_wrap=True)


def _print_list() -> None:
    from rich.table import Table

    from lockkit.attack.registry import registry

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, found in registry().items():
        suites = "; in quick" if found.in_quick else ""
        table.add_row(name, f"{found.description}\n{found.reference}{suites}\n")
    console.print(table)


def _print(summary: Summary) -> None:
    from lockkit.attack.audited import audited_sentence

    console.print(audited_sentence(summary), soft_wrap=True)
    console.print(summary.verdict.sentence, soft_wrap=True)
    for task, figures in summary.tasks.items():
        console.print(_table(task, figures))
        if summary.verdict.missing:
            continue  # ratios would not count
        for kind, title in KINDS.items():
            for line in _ratios(getattr(figures, kind), title):
                console.print(f"  {line}", soft_wrap=True)
        bounds = {key: found for key, found in figures.attention_only_bound.items() if found and found.value}
        if bounds:
            shown = ", ".join(f"{found.says} in {RESOURCE_TITLES[key]}" for key, found in bounds.items() if found)
            console.print(f"  {ATTENTION_ONLY_BOUND}: {shown}", soft_wrap=True)
    for line in _lock_lines(summary):
        console.print(line, soft_wrap=True)


def _ratios(found: Amplifications, kind: str) -> Iterator[str]:
    """One line per resource, or one if there is nothing to say."""
    lines = [
        f"{title}: {value.says}" + (f" ({value.best_attack})" if value.best_attack else "")
        for key, title in RESOURCE_TITLES.items()
        if (value := found.get(key))
    ]
    if lines:
        yield f"{kind}:"
        yield from (f"  {line}" for line in lines)


def _table(task: str, figures: TaskSummary) -> Table:
    rows = []
    for line in figures.attacks:
        runs = (line.original, line.locked)
        losses = [f"{run.best_loss:.3f}" if run else "" for run in runs]
        costs = [spent(run, "tokens") for run in runs] + [spent(run, "flops", 1e9) for run in runs]
        name = line.attack.replace(", then", ",\n then") + (f"\n ({line.says})" if line.says else "")
        rows.append([name, *losses, *costs])
    title = f"{task}: one run per attack and model, and what it spent to the target loss {figures.target_loss:.3f}"
    heads = [f"{what}\n{model}" for what in ("loss", "tokens", "GFLOP") for model in ("original", "lock")]
    return figures_table(title, ["attack", *heads], rows)


def spent(run: Run | None, resource: str, unit: float = 1) -> str:
    """What a run spent until the target, as a cell."""
    if run is None:
        return "not run"
    if run.spent is None:
        return "> budget"
    value = getattr(run.spent, resource)
    return f"{value / unit:,.0f}" if math.isfinite(value) else NOT_FINITE


def _lock_lines(summary: Summary) -> Iterator[str]:
    """One line per unlock, then the figures of the lock as a whole."""
    from lockkit.measure.records import MeasuredText

    if not summary.has_chains:
        return
    yield f"perplexity and KL divergence on {MeasuredText(**summary.quality['fidelity']['text'])}:"
    for label, unlock in summary.unlocks.items():
        yield (
            f"{label}: perplexity {_number(unlock['perplexity'])}, KL to the lock {_number(unlock['kl_to_lock'], '.5f')}"
        )
    depth = summary.effective_depth
    yield (
        f"effective depth: {depth['says']} of {depth['depth']} (KL within {depth['kl_limit']}); "
        f"{depth['says_within_5_percent']} (perplexity within 5 %)"
    )
    for name, found in (("unlock ratio", summary.unlock_ratio), ("owner's advantage", summary.owner_advantage)):
        caveat = found.get("caveat")
        yield f"{name}: {found['says']}" + (f" ({caveat})" if caveat else "")


def _number(value: float | None, form: str = ".3f") -> str:
    return NOT_FINITE if value is None else format(value, form)
