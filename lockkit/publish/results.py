"""Results of `lockkit verify` and `lockkit attack` for a model card: text, and entries of its `model-index`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lockkit.attack.target import RESOURCE_TITLES, lowest_amplification
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.verify.result import VerifyResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


NATS = "nats per token"


@dataclass(frozen=True)
class Results:
    """The results of one command.

    Attributes:
        part: of the card that they replace (lockkit/models/card.py).
        text: Markdown, with a heading.
        index: entries of `model-index`.
    """

    part: str
    text: str
    index: list[EvalResult]


def lock_results(record: dict[str, Any]) -> list[EvalResult]:
    """The figures in `lockkit.json` as entries of `model-index`."""
    return _fidelity(Fidelity(**record["fidelity"]), "lock")


def verify_results(result: VerifyResult, of_export: bool) -> Results:
    """The results of a verification.

    Args:
        result: from `lockkit verify --json`.
        of_export: for the card of the export; else for that of the locked model it was made from.
    """
    ratios = result.perplexity
    known = {"original": ratios.original, "locked": ratios.locked, "ONNX": ratios.onnx}
    names = [name for name, value in known.items() if value is not None]
    over = {"original": ratios.onnx_over_original, "locked": ratios.onnx_over_locked}
    ratio = ", ".join(f"{value:.4f} times the {name}'s" for name, value in over.items() if value is not None)
    failed = ", ".join(dict.fromkeys(outcome.gate for outcome in result.failed_gates))
    verdict = f"**FAILED** ({failed})" if failed else "passed all gates"
    rows = "\n".join(
        f"| {row.mode.replace('_', ' ')} | {row.tokens:,} | {row.kl_divergence:.1e} | {row.top1_agreement:.2%} "
        f"| {row.max_difference:.1e} |"
        for row in result.parity
    )
    text = f"""## Verification

{"This export" if of_export else "An ONNX export of this model"} ({result.precision}, {result.provider}) {verdict}.
It was compared with the {result.compared_with} model in PyTorch on {result.text}.

| {" | ".join(f"perplexity, {name}" for name in names)} |
|{"---|" * len(names)}
| {" | ".join(f"{known[name]:.3f}" for name in names)} |

The perplexity in ONNX is {ratio}.

| way of running | tokens | KL from PyTorch to ONNX, nats per token | same top token | largest difference of logits |
|---|---|---|---|---|
{rows}

{_made(result.created, result.versions)}"""
    index = _fidelity(result.fidelity, "verify") if result.fidelity and not of_export else []
    if of_export:
        worst = max(row.kl_divergence for row in result.parity)
        index = [
            _entry("perplexity", "perplexity", ratios.onnx, result.text, "verify"),
            _entry("kl_divergence", f"KL divergence from PyTorch to ONNX, {NATS}", worst, result.text, "verify"),
        ]
    return Results("verify", text, index)


def audit_results(summary: dict[str, Any]) -> Results:
    """The results of an audit: what the lock is worth.

    Args:
        summary: content of `summary.json` (lockkit/attack/summary.py).
    """
    from huggingface_hub import EvalResult

    lowest = {key: found for key in RESOURCE_TITLES if (found := lowest_amplification(summary, key))}
    if summary["verdict"]["missing"]:
        lowest = {}  # the ratios do not count
    reached = {key: (task, found) for key, (task, found) in lowest.items() if found["value"] is not None}
    lines = "\n".join(
        f"| {RESOURCE_TITLES[key]} | {_public(task)} | {found['says']} | {found['best_attack'] or '–'} |"
        for key, (task, found) in lowest.items()
    )
    head = "| resource | task | against the cheapest of these attacks | attack |\n|---|---|---|---|\n"
    table = f"{head}{lines}\n\n" if lines else ""
    depth = summary["effective_depth"]
    text = f"""## What this lock is worth

**{worth_line(summary)}**

{table}- Effective depth: {depth["says"]} of {depth["depth"]} blocks (KL divergence within {depth["kl_limit"]}),
  {depth["says_within_5_percent"]} (perplexity within 5 %).
- Unlock ratio: {summary["unlock_ratio"]["says"]}. Owner's advantage: {summary["owner_advantage"]["says"]}.
- Budget: {summary["budget"]}.
- Not tried: {"; ".join(summary["not_tried"]) or "none of lockkit's attacks"}.

These figures say nothing about attacks that were not tried. If the original weights are public, the lock adds no cost.

{_made(summary["created"], summary["versions"])}"""
    index = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_public(task),
            dataset_name=_public(task),
            metric_type=f"fine_tuning_cost_ratio_{key}",
            metric_name=_named(f"cost of fine-tuning the lock over that of the original, {title}", "attack"),
            metric_value=round(reached[key][1]["value"], 4),
        )
        for key, title in RESOURCE_TITLES.items()
        if key in reached
        for task in [reached[key][0]]
    ]
    return Results("attack", text, index)


def worth_line(summary: dict[str, Any]) -> str:
    """One line on what a lock is worth, from the summary of its audit."""
    verdict = summary["verdict"]
    if verdict["rules"]:  # a summary of an earlier version has none
        return verdict["sentence"]
    lowest = [lowest_amplification(summary, key) for key in RESOURCE_TITLES]
    values = [found[1]["value"] for found in lowest if found and found[1]["value"] is not None]
    if summary["first_line"]:
        return summary["first_line"]
    if not values:
        return "No valid attack reached a target, so this audit does not show what the lock costs an attacker."
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    times = low if low == high else f"{low} to {high}"
    return (
        f"Fine-tuning this lock costs {times} times as much as fine-tuning the original, by the cheapest attacks of "
        "the audit. At 1.00 a lock adds no cost."
    )


def ours(name: str | None, command: str) -> bool:
    """Whether an entry of `model-index` with this metric name is from `command`, in an earlier card."""
    return name is not None and name.endswith(f"(lockkit {command})")


def _named(metric: str, command: str) -> str:
    return f"{metric} (lockkit {command})"


def _fidelity(fidelity: Fidelity, command: str) -> list[EvalResult]:
    text = fidelity.text
    return [
        _entry("perplexity", "perplexity", fidelity.perplexity, text, command),
        _entry("perplexity_ratio", "perplexity over the original's", fidelity.perplexity_ratio, text, command),
        _entry("kl_divergence", f"KL divergence from the original, {NATS}", fidelity.kl_divergence, text, command),
        _entry("top1_agreement", "same top token as the original", fidelity.top1_agreement, text, command),
    ]


def _entry(kind: str, metric: str, value: float, text: MeasuredText, command: str) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=text.source.partition(":")[0],
        dataset_name=str(text),
        dataset_split=text.split,
        metric_type=kind,
        metric_name=_named(metric, command),
        metric_value=float(f"{value:.6g}"),
    )


def _public(task: str) -> str:
    """The name of a task without local folders, on one line and without a table's separators."""
    return " ".join(PurePath(task).name.replace("|", " ").split()) or "task"


def _made(created: str, versions: dict[str, str]) -> str:
    return f"Measured by lockkit {versions['lockkit']} on {created[:10]}."
