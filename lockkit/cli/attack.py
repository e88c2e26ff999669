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
        list[str] | None, typer.Option(help="What to fine-tune on, in place of the suite's tasks; may be repeated.")
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Learning rate, in place of the suite's; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each fine-tuning run.")] = None,
    batch_rows: Annotated[int | None, typer.Option(help="Rows in a step.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Length of a row, in tokens.")] = None,
    held_out_tokens: Annotated[int | None, typer.Option(help="Tokens of a task that measure.")] = None,
    evaluation_tokens: Annotated[int | None, typer.Option(help="Tokens that measure perplexity and KL.")] = None,
    unlock_tokens: Annotated[int | None, typer.Option(help="Unlabelled tokens for closed-form unlocks.")] = None,
    redistill_tokens: Annotated[int | None, typer.Option(help="Tokens of a re-distillation, at most.")] = None,
    redistill_budget: Annotated[
        list[float] | None,
        typer.Option(help="Tokens of a re-distillation, in multiples of the lock's own; may be repeated."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of headline rows.")] = None,
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
        from lockkit.attack.base import registry

        for attack_name, found in registry().items():
            console.print(f"{attack_name}: {found.description} [{found.reference}]", soft_wrap=True, markup=False)
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
        summary = run_audit(locked, original, out, config, name, progress)
    _print(summary)
    console.print(f"wrote {out}: rows.jsonl, summary.json and the unlocked models", soft_wrap=True)


def _print(summary: dict) -> None:
    from rich.table import Table

    if summary["first_line"]:
        console.print(summary["first_line"])
    for task, figures in summary["tasks"].items():
        table = Table(title=f"{task}: target {figures['target_loss']:.3f}", title_justify="left")
        for column in ("attack", "best on original", "best on lock", "tokens", "GFLOP", "peak MB", ""):
            table.add_column(column)
        for row in figures["attacks"]:
            cost = row["locked"]
            table.add_row(
                row["attack"],
                *(_number(row[key]) for key in ("best_loss_original", "best_loss_locked")),
                *(["> budget", "", ""] if cost is None else [
                    f"{cost['tokens']:,}", f"{cost['flops'] / 1e9:,.0f}", f"{cost['peak_tensor_bytes'] / 1e6:,.0f}"
                ]),
                row["says"],
            )  # fmt: skip
        console.print(table)
        for resource, found in figures["amplification"].items():
            if found:
                best = f" ({found['best_attack']})" if found["best_attack"] else ""
                console.print(f"  {resource}: {found['says']}{best}", soft_wrap=True)
    for label, unlock in summary["unlocks"].items():
        console.print(
            f"{label}: perplexity {unlock['perplexity']:.3f}, KL to the lock {unlock['kl_to_lock']:.5f}", soft_wrap=True
        )
    depth = summary["effective_depth"]
    console.print(f"effective depth {depth['says']} of {depth['depth']} (KL within {depth['kl_limit']})")
    console.print(f"unlock ratio: {summary['unlock_ratio']['says']}", soft_wrap=True)
    console.print(f"owner's advantage: {summary['owner_advantage']['says']}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
