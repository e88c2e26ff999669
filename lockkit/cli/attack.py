"""`lockkit attack`: what a lock is worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.attack.config import AuditConfig, audit_config
from lockkit.attack.target import NOT_FINITE
from lockkit.cli.console import TerminalProgress, console
from lockkit.cli.options import Given
from lockkit.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table


def attack(
    locked: Annotated[str | None, typer.Argument(metavar="LOCKED", help="Folder that `lockkit lock` wrote.")] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="The model it was made from: `demo`, a folder, a Hub id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for rows and summary; an audit that is there is resumed.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option("--attack", help="Only this attack.")] = None,
    controls: Annotated[
        list[Path] | None,
        typer.Option("--controls", help="Another audit, whose rows of the original are reused where they fit."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print all attacks, and exit.")] = False,
    *,
    given: Given[AuditConfig],
) -> None:
    """Attack LOCKED, and say what it costs beside the original.

    Every attack is tried on the original first. `rows.jsonl` in OUT gets a row for each run,
    `summary.json` the figures; an interrupted audit resumes when the same command is given again.

    Examples:

    \b
        lockkit attack --list
        lockkit attack ./locked --original demo --out audit
        lockkit attack ./locked --original demo --out audit \\
            --attack stack-solve --attack lora
    """
    if list_:
        _print_list()
        return
    for value, what in ((locked, "LOCKED"), (original, "--original MODEL"), (out, "--out DIR")):
        if value is None:
            raise UsageError(f"{what} is missing: lockkit attack LOCKED --original MODEL --out DIR")
    config = audit_config(**given)

    from lockkit.attack.run import run_audit

    with TerminalProgress() as progress:
        summary = run_audit(locked, original, out, config, name, controls, progress)
    _print(summary)
    console.print(f"wrote {out}: rows.jsonl, summary.json and the unlocked models", soft_wrap=True)


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


def _print(summary: dict) -> None:
    if summary["first_line"]:
        console.print(summary["first_line"])
    for task, figures in summary["tasks"].items():
        console.print(_table(task, figures))
        for resource, found in figures["amplification"].items():
            if found:
                best = f" ({found['best_attack']})" if found["best_attack"] else ""
                console.print(f"  {resource.replace('_', ' ')}: {found['says']}{best}", soft_wrap=True)
        bounds = {key: found for key, found in figures["attention_only_bound"].items() if found and found["value"]}
        if bounds:
            said = ", ".join(f"{found['says']} in {key.replace('_', ' ')}" for key, found in bounds.items())
            console.print(
                f"  bound for every lock of this shape (all but the chains fine-tuned, `frozen-dlr`): {said}",
                soft_wrap=True,
            )
    for line in _lock_lines(summary):
        console.print(line, soft_wrap=True)


def _table(task: str, figures: dict) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{task}: lowest held-out losses, and least cost to the target {figures['target_loss']:.3f}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("attack", no_wrap=True)
    for column in ("original", "lock", "tokens", "GFLOP", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", min_width=7)
    for row in figures["attacks"]:
        losses = [_number(row[key]) for key in ("best_loss_original", "best_loss_locked")]
        table.add_row(row["attack"].replace(", then", ",\n then"), *losses, *_costs(row), row["says"])
    return table


def _lock_lines(summary: dict) -> Iterator[str]:
    """What the audit found about the lock as a whole."""
    from lockkit.measure.records import MeasuredText

    yield f"perplexity and KL divergence on {MeasuredText(**summary['quality']['fidelity']['text'])}:"
    for label, unlock in summary["unlocks"].items():
        yield (
            f"{label}: perplexity {_number(unlock['perplexity'], missing=NOT_FINITE)}, "
            f"KL to the lock {_number(unlock['kl_to_lock'], '.5f', NOT_FINITE)}"
        )
    depth = summary["effective_depth"]
    yield (
        f"effective depth: {depth['says']} of {depth['depth']} (KL within {depth['kl_limit']}); "
        f"{depth['says_within_5_percent']} (perplexity within 5 %)"
    )
    for name, key in (("unlock ratio", "unlock_ratio"), ("owner's advantage", "owner_advantage")):
        caveat = summary[key].get("caveat")
        yield f"{name}: {summary[key]['says']}" + (f" ({caveat})" if caveat else "")


def _costs(row: dict) -> list[str]:
    cost = row["locked"]
    if cost is None:
        return ["> budget" if row["trials_locked"] else "not run", "", ""]
    flops = cost["flops"] and cost["flops"] / 1e9
    return [
        f"{cost['tokens']:,.0f}",
        _number(flops, ",.0f", NOT_FINITE),
        f"{cost['peak_tensor_bytes'] / 1e6:,.0f}",
    ]


def _number(value: float | None, form: str = ".3f", missing: str = "") -> str:
    return missing if value is None else format(value, form)
