"""A verification in a report: verdict, gates, perplexity, parity."""

from __future__ import annotations

from pathlib import Path

from lockkit.report.page import Section, Stack, Table, made_with, measured_on, number
from lockkit.report.sections import reports

NAMED = 3  # failed gates in the verdict; the table has all


@reports("lockkit-verify/1", place=2)
def verify_sections(record: dict, path: Path) -> list[Section]:
    """The section from the JSON of `lockkit verify`. Entries without which there is still a verdict may be missing.

    Raises:
        KeyError, ValueError: there is no verdict.
    """
    name, passed, gates = _name(record["export"]), record["passed"], record["gates"]
    if not gates or passed != all(gate["passed"] for gate in gates):
        raise ValueError(f"passed is {passed}, which does not follow from its {len(gates)} gates")
    section = Section(f"Verification of {name}: {'passed' if passed else 'FAILED'}", passed=passed)
    section.verdict = _verdict(name, passed, gates)
    ratios, fidelity = record.get("perplexity", {}), record.get("fidelity") or {}
    found = [
        ("perplexity, ONNX / original", ratios.get("onnx_over_original"), ".4f"),
        ("perplexity, ONNX / locked", ratios.get("onnx_over_locked"), ".4f"),
        ("KL from original to locked, nats per token", fidelity.get("kl_divergence"), ".5f"),
        ("top-1 agreement, original and locked", fidelity.get("top1_agreement"), ".2%"),
    ]
    section.figures = [("precision", str(record.get("precision", "–")))]
    section.figures += [(label, number(value, form)) for label, value, form in found if value is not None]
    section.text.append(measured_on(record.get("text")))
    section.tables = [_gates(gates), _perplexity(ratios), _parity(record.get("parity", []))]
    compared = record.get("compared_with")
    section.facts = [("compared with", f"{_name(record.get(compared, ''))} ({compared})")] if compared else []
    section.facts += [("provider", record["provider"])] if record.get("provider") else []
    section.facts += made_with(record)
    return [section]


def _name(path: str) -> str:
    """The last part of a path."""
    return str(path).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _verdict(name: str, passed: bool, gates: list[dict]) -> str:
    if passed:
        return f"{name} is the same model within all {len(gates)} limits."
    failed = [gate for gate in gates if not gate["passed"]]
    reasons = [f"{gate['gate']} ({gate['figure']}) {_reason(gate)}" for gate in failed]
    reasons[NAMED:] = [f"and {len(failed) - NAMED} more, in the table"] if len(failed) > NAMED else []
    return f"{len(failed)} of {len(gates)} limits are exceeded: {'; '.join(reasons)}."


def _reason(gate: dict) -> str:
    value = gate["value"]
    return f"is {'not finite' if value is None else number(value)}, limit {number(gate['limit'])}"


def _gates(gates: list[dict]) -> Table:
    """All gates, those that failed first."""
    ordered = sorted(gates, key=lambda gate: bool(gate["passed"]))
    rows = [
        [
            Stack(gate["gate"], gate["figure"]),
            "passed" if gate["passed"] else "FAILED" if gate["value"] is not None else "FAILED: not finite",
            number(gate["value"]),
            number(gate["limit"]),
        ]
        for gate in ordered
    ]
    failed = [index for index, gate in enumerate(ordered) if not gate["passed"]]
    return Table(["gate", "outcome", "value", "limit"], rows, failed)


def _perplexity(figures: dict) -> Table:
    names = {"original": "original, PyTorch", "locked": "locked, PyTorch", "onnx": "ONNX"}
    rows = [
        [
            label,
            number(figures[key], ".3f"),
            number(figures.get(f"{key}_over_original"), ".4f"),
            number(figures.get(f"{key}_over_locked"), ".4f"),
        ]
        for key, label in names.items()
        if figures.get(key) is not None
    ]
    return Table(["perplexity of", "perplexity", "/ original", "/ locked"], rows)


def _parity(modes: list[dict]) -> Table:
    rows = [
        [
            row["mode"].replace("_", " "),
            number(row["tokens"]),
            number(row["kl_divergence"], ".2e"),
            number(row["top1_agreement"], ".2%"),
            number(row["max_difference"], ".2e"),
        ]
        for row in modes
    ]
    return Table(
        ["way of running", "tokens", "KL, nats per token", "top-1 agreement", "largest difference of logits"], rows
    )
