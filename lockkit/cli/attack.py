"""`lockkit attack`: audit a lock, by what it adds to the cost of fine-tuning."""

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
        str | None, typer.Option("--original", help="Model that the lock was made from: `demo`, a folder, or a Hub id.")
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
    list_: Annotated[bool, typer.Option("--list", help="Print all attacks and exit.")] = False,
    *,
    given: Given[AuditConfig],
) -> None:
    """Attack LOCKED and compare the cost with that of the original.

    Each attack first runs on the original (positive control). The --out folder gets `rows.jsonl`,
    with one row per run, and `summary.json`, with the figures. If the audit is interrupted, run the
    same command again to resume it.

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
    if locked is None or original is None or out is None:
        needed = {"LOCKED": locked, "--original MODEL": original, "--out DIR": out}
        missing = next(what for what, value in needed.items() if value is None)
        raise UsageError(f"{missing} is missing: lockkit attack LOCKED --original MODEL --out DIR")
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
            shown = ", ".join(f"{found['says']} in {key.replace('_', ' ')}" for key, found in bounds.items())
            console.print(
                f"  upper bound for every lock of this shape, by training all but the chains (`frozen-dlr`): {shown}",
                soft_wrap=True,
            )
    for line in _lock_lines(summary):
        console.print(line, soft_wrap=True)


def _table(task: str, figures: dict) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{task}: lowest held-out loss, and lowest cost to the target loss {figures['target_loss']:.3f}"
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
    """One line per unlock, then the figures of the lock as a whole."""
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
