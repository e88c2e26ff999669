"""`lockkit lock`: distil a model into its locked form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockkit.cli.console import TerminalProgress, console, figures_table
from lockkit.cli.options import Given
from lockkit.lock.config import LockConfig, make_config

if TYPE_CHECKING:
    from rich.table import Table


def lock(
    model: Annotated[str, typer.Argument(help="Local folder, `.gguf` file, Hub id, or `demo`.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")],
    given: Given[LockConfig],
    recipe: Annotated[
        Path | None, typer.Option("--config", help="YAML file with the same settings (a recipe). Options override it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if lockkit wrote all of it.")] = False,
) -> None:
    """Distil MODEL into its locked form and write it to OUT.

    Every MLP is replaced by a chain: a deep low-rank residual network of the same parameter count.
    Each layer's chain is fitted and trained by itself (phase 1). --max-kl says how much quality the lock may cost.
    If --end-to-end-tokens asks for it, all chains are then trained together on the logits (phase 2).
    OUT is an ordinary Hugging Face folder. If the command is interrupted, run it again to resume.

    Examples:

    \b
        lockkit lock demo locked
        lockkit lock ./my-model ./my-model-locked --depth 32 --data corpus.txt
        lockkit lock Qwen/Qwen3-0.6B qwen-locked --config recipe.yaml
    """
    config = make_config(recipe, **given)
    from lockkit.lock.run import lock_model

    with TerminalProgress() as progress:
        result = lock_model(model, out, config, overwrite=overwrite, progress=progress)
    if result is None:  # only the first of several workers has the result
        return
    console.print(_table(result.record))
    if result.record["other_texts"]:
        console.print(_other_texts(result.record["other_texts"]))
    console.print(_memory(result.record["memory"]))
    console.print(f"wrote {out}: the locked model, its lockkit.json and a model card", soft_wrap=True)
    if warning := result.origin.warning(out):
        console.print(warning, soft_wrap=True)


def _memory(memory: dict) -> str:
    beyond = memory["peak_bytes"] - memory["idle_bytes"]
    return (
        f"peak memory {memory['peak_bytes'] / 1e9:.2f} GB; {beyond / 1e9:.2f} GB besides that of the libraries "
        f"(predicted: {memory['predicted_bytes'] / 1e9:.2f} GB)"
    )


def _other_texts(figures: list[dict]) -> Table:
    """The same figures on text of other kinds than the lock was distilled on."""
    rows = [
        (
            f"{fidelity['text']['source']}",
            f"{fidelity['original_perplexity']:.3f}",
            f"{fidelity['perplexity_ratio']:.4f}",
            f"{fidelity['kl_divergence']:.5f}",
            f"{fidelity['top1_agreement']:.2%}",
        )
        for fidelity in figures
    ]
    heads = ("text", "perplexity,\noriginal", "locked /\noriginal", "KL, nats\nper token", "top-1\nagreement")
    return figures_table("on text of other kinds", heads, rows)


def _table(record: dict) -> Table:
    from lockkit.measure.records import MeasuredText

    fidelity, dlr, phase_1 = record["fidelity"], record["dlr"], record["after_phase_1"]
    rank = f"{dlr['rank']}" if dlr["rank"] == dlr["smallest_rank"] else f"{dlr['smallest_rank']} or {dlr['rank']}"
    nmse = [layer["nmse"] for layer in record["layers"]]

    def row(name: str, key: str, form: str, original: str = "") -> tuple[str, str, str, str]:
        return name, original, format(phase_1[key], form), format(fidelity[key], form)

    rows = [
        row("perplexity", "perplexity", ".3f", f"{fidelity['original_perplexity']:.3f}"),
        row("perplexity, locked / original", "perplexity_ratio", ".4f"),
        row("KL, nats per token", "kl_divergence", ".5f"),
        row("top-1 agreement", "top1_agreement", ".2%"),
        ("NMSE of layers, lowest", "", f"{min(nmse):.5f}", ""),
        ("NMSE of layers, highest", "", f"{max(nmse):.5f}", ""),
    ]
    title = f"{record['model']}, locked: depth {dlr['depth']}, rank {rank}"
    table = figures_table(title, ("held-out measure", "original", "after\nphase 1", "locked"), rows)
    table.caption, table.caption_justify = f"on {MeasuredText(**fidelity['text'])}", "left"
    return table
