"""`lockkit attack`: what a lock is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lockkit.attack.config import AuditConfig, audit_config
from lockkit.cli.app import app
from lockkit.cli.console import TerminalProgress, console, option
from lockkit.errors import UsageError


@app.command()
def attack(
    locked: Annotated[str | None, typer.Argument(metavar="LOCKED", help="Folder that `lockkit lock` wrote.")] = None,
    original: Annotated[
        str | None, typer.Option(help="The model it was made from: `demo`, a folder, a Hub id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rows and summary; an audit that is there goes on.")
    ] = None,
    suite: Annotated[str | None, option(AuditConfig, "suite")] = None,
    name: Annotated[list[str] | None, typer.Option("--attack", help="Only this attack; may be repeated.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="What to fine-tune on, in place of the suite's tasks: `docstrings`, `signatures`, a chat-format "
            ".jsonl, or a text file, folder or Hub dataset (10 % of its passages); may be repeated."
        ),
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Learning rate, in place of the suite's; may be repeated.")
    ] = None,
    steps: Annotated[int | None, option(AuditConfig, "steps")] = None,
    batch_rows: Annotated[int | None, option(AuditConfig, "batch_rows")] = None,
    block_tokens: Annotated[int | None, option(AuditConfig, "block_tokens")] = None,
    held_out_tokens: Annotated[int | None, option(AuditConfig, "held_out_tokens")] = None,
    evaluation_tokens: Annotated[int | None, option(AuditConfig, "evaluation_tokens")] = None,
    unlock_tokens: Annotated[int | None, option(AuditConfig, "unlock_tokens")] = None,
    redistill_tokens: Annotated[int | None, option(AuditConfig, "redistill_tokens")] = None,
    redistill_budget: Annotated[
        list[float] | None,
        typer.Option(help="Tokens of a re-distillation, in multiples of the lock's own; may be repeated."),
    ] = None,
    seeds: Annotated[int | None, option(AuditConfig, "seeds")] = None,
    exhaustive: Annotated[bool | None, option(AuditConfig, "exhaustive", "--exhaustive")] = None,
    sweep: Annotated[int | None, option(AuditConfig, "sweep")] = None,
    controls: Annotated[
        list[Path] | None,
        typer.Option(help="Another audit, whose rows of the original are reused where they fit; may be repeated."),
    ] = None,
    seed: Annotated[int | None, option(AuditConfig, "seed")] = None,
    target_share: Annotated[float | None, option(AuditConfig, "target_share")] = None,
    effective_depth_kl: Annotated[float | None, option(AuditConfig, "effective_depth_kl")] = None,
    data: Annotated[str | None, option(AuditConfig, "data")] = None,
    device: Annotated[str | None, option(AuditConfig, "device")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print all attacks, and exit.")] = False,
) -> None:
    """Attack LOCKED, and say what it costs beside the original.

    Every attack is tried on the original first. `rows.jsonl` in OUT gets a row for each run,
    `summary.json` the figures; an interrupted audit goes on when the same command is given again.

    Examples:

        lockkit attack --list

        lockkit attack ./locked --original demo --out audit

        lockkit attack ./locked --original demo --attack stack-solve --attack lora --out audit
    """
    if list_:
        _print_list()
        return
    for value, what in ((locked, "LOCKED"), (original, "--original MODEL"), (out, "--out DIR")):
        if value is None:
            raise UsageError(f"{what} is missing: lockkit attack LOCKED --original MODEL --out DIR")
    given = {key: value for key, value in locals().items() if key in AuditConfig.model_fields and key != "suite"}
    config = audit_config(
        suite or "quick", tasks=task, learning_rates=learning_rate, redistill_budgets=redistill_budget, **given
    )

    from lockkit.attack.run import run_audit

    with TerminalProgress() as progress:
        summary = run_audit(locked, original, out, config, name, controls, progress)
    _print(summary)
    console.print(f"wrote {out}: rows.jsonl, summary.json and the unlocked models", soft_wrap=True)


def _print_list() -> None:
    from rich.table import Table
    from rich.text import Text

    from lockkit.attack.base import registry

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, found in registry().items():
        suites = "; in quick" if found.in_quick else ""
        table.add_row(name, Text(f"{found.description}\n{found.reference}{suites}\n"))
    console.print(table)


def _print(summary: dict) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lockkit.measure.records import MeasuredText

    if summary["first_line"]:
        console.print(summary["first_line"])
    for task, figures in summary["tasks"].items():
        title = f"{task}: lowest held-out losses, and least cost to the target {figures['target_loss']:.3f}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("attack", no_wrap=True)
        for column in ("original", "lock", "tokens", "GFLOP", "peak MB"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", min_width=7)
        for row in figures["attacks"]:
            losses = [_number(row[key]) for key in ("best_loss_original", "best_loss_locked")]
            table.add_row(row["attack"].replace(", then", ",\n then"), *losses, *_costs(row), Text(row["says"]))
        console.print(table)
        for resource, found in figures["amplification"].items():
            if found:
                best = f" ({found['best_attack']})" if found["best_attack"] else ""
                console.print(f"  {resource.replace('_', ' ')}: {found['says']}{best}", soft_wrap=True)
    console.print(f"perplexity and KL divergence on {MeasuredText(**summary['quality']['fidelity']['text'])}:")
    for label, unlock in summary["unlocks"].items():
        console.print(
            f"{label}: perplexity {unlock['perplexity']:.3f}, KL to the lock {unlock['kl_to_lock']:.5f}", soft_wrap=True
        )
    depth = summary["effective_depth"]
    console.print(
        f"effective depth: {depth['says']} of {depth['depth']} (KL within {depth['kl_limit']}); "
        f"{depth['says_within_5_percent']} (perplexity within 5 %)",
        soft_wrap=True,
    )
    for name, key in (("unlock ratio", "unlock_ratio"), ("owner's advantage", "owner_advantage")):
        caveat = summary[key].get("caveat")
        console.print(f"{name}: {summary[key]['says']}" + (f" ({caveat})" if caveat else ""), soft_wrap=True)


def _costs(row: dict) -> list[str]:
    cost = row["locked"]
    if cost is None:
        return ["> budget" if row["trials_locked"] else "not run", "", ""]
    return [f"{cost['tokens']:,.0f}", f"{cost['flops'] / 1e9:,.0f}", f"{cost['peak_tensor_bytes'] / 1e6:,.0f}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
