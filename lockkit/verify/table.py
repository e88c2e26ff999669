"""The result of a verification as tables for a terminal of 80 columns, and its failures as one line."""

from __future__ import annotations

import math

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lockkit.settings import option_of
from lockkit.verify.config import VerifyConfig
from lockkit.verify.figures import GATES, Continuations, Parity
from lockkit.verify.result import VerifyResult

_MODES = {
    "prefill": "whole rows, no cache",
    "cache_tokens": "cache, token by token",
    "cache_chunk": "cache, in one chunk",
    "padded_batch": "padded batch",
    "last_position": "padded batch, last token",
}


def print_result(result: VerifyResult, console: Console) -> None:
    """Print all figures, then all gates with their limits."""
    console.print(result_tables(result))


def result_tables(result: VerifyResult) -> RenderableType:
    """All tables of a result, one below the other."""
    lines = [
        f"{result.export}: {result.precision} on {result.provider}",
        f"compared with {getattr(result, result.compared_with)} ({result.compared_with}), in PyTorch float32",
        f"measured on {result.text}",
    ]
    if not result.same_weights:
        lines.append("note: its weights are not, byte for byte, those that were exported")
    parts: list[RenderableType] = [Text("\n".join(lines)), _parity(result), _perplexity(result)]
    if result.continuations is not None:
        parts.append(_continuations(result.continuations))
    parts += [_gates(result), Text("passed" if result.passed else "FAILED", style="green" if result.passed else "red")]
    return Group(*parts)


def failure_line(result: VerifyResult) -> str:
    """One line with the name, figure, value and limit of each failed gate."""
    failed = result.failed_gates
    details = [
        f"{outcome.gate} ({outcome.figure}) is {number(outcome.value)}, limit {number(outcome.limit)}"
        for outcome in failed
    ]
    hint = "" if result.same_weights else " (not the weights that were exported: is --reference the right model?)"
    return f"{len(failed)} of {len(result.gates)} gates failed: {'; '.join(details)}{hint}"


def number(value: float | None) -> str:
    """A figure with five digits, or with three if it is very small or large; "not finite" for NaN and None."""
    if value is None or not math.isfinite(value):
        return "not finite" if value is None or math.isnan(value) else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.5g}"
    return f"{value:.2e}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True, header_style="dim")
    return table


def _parity(result: VerifyResult) -> Table:
    table = _table("\nONNX and PyTorch", *(field.title or "" for field in Parity.model_fields.values()))
    for parity in result.parity:
        mode, tokens, *figures = (getattr(parity, name) for name in Parity.model_fields)
        table.add_row(_MODES[mode], f"{tokens:,}", *(number(figure) for figure in figures))
    return table


def _perplexity(result: VerifyResult) -> Table:
    figures = result.perplexity
    table = _table("\nHeld-out perplexity", "", "perplexity", "/ original", "/ locked", "KL to original", "top-1")
    fidelity = result.fidelity
    rows: list[tuple[str, *tuple[float | None, ...]]] = [
        ("original, PyTorch", figures.original, None, None, None, None),
        (
            "locked, PyTorch",
            figures.locked,
            figures.locked_over_original,
            None,
            fidelity.kl_divergence if fidelity else None,
            fidelity.top1_agreement if fidelity else None,
        ),
        ("ONNX", figures.onnx, figures.onnx_over_original, figures.onnx_over_locked, None, None),
    ]
    for name, *values in rows:
        if values[0] is not None:
            table.add_row(name, *("" if value is None else number(value) for value in values))
    return table


def _continuations(found: Continuations) -> Text:
    same = found.prompts - len(found.partings)
    lines = [
        "",
        f"Greedy continuations: {same} of {found.prompts} identical over {found.new_tokens} tokens",
    ]
    for parting in found.partings[:4]:
        tie = "a tie" if parting.tied else "no tie"
        lines.append(f"  prompt {parting.prompt} differs at token {parting.position}: gap {number(parting.gap)}, {tie}")
    if len(found.partings) > 4:
        lines.append(f"  and {len(found.partings) - 4} more")
    return Text("\n".join(lines))


def _gates(result: VerifyResult) -> Table:
    table = _table("\nGates", "gate", "figure", "value", "limit", "")
    for outcome in result.gates:
        verdict = Text("pass", style="green") if outcome.passed else Text("FAIL", style="red")
        table.add_row(
            option_of(VerifyConfig, outcome.gate),
            _MODES.get(outcome.figure, outcome.figure.replace("_", " ")),
            number(outcome.value),
            f"{GATES[outcome.gate].sign} {number(outcome.limit)}",
            verdict,
        )
    return table
