"""A lock in a report: its fidelity and the error of each layer."""

from __future__ import annotations

from pathlib import Path

from lockkit.report.page import Curve, Section, Table, made_with, measured_on, number
from lockkit.report.sections import reports


@reports("lockkit-lock/2", place=1)
def lock_sections(record: dict, path: Path) -> list[Section]:
    """The section from `lockkit.json`. Other entries than its model and its layers may be missing."""
    fidelity, dlr, layers = record.get("fidelity", {}), record.get("dlr", {}), record["layers"]
    section = Section(f"Lock of {record['model']}")
    found = [
        ("perplexity, locked / original", fidelity.get("perplexity_ratio"), ".4f"),
        ("perplexity, locked", fidelity.get("perplexity"), ".3f"),
        ("perplexity, original", fidelity.get("original_perplexity"), ".3f"),
        ("KL from original to locked, nats per token", fidelity.get("kl_divergence"), ".5f"),
        ("top-1 agreement", fidelity.get("top1_agreement"), ".2%"),
        ("depth", dlr.get("depth"), "d"),
    ]
    section.figures = [(label, number(value, form)) for label, value, form in found if value is not None]
    if fidelity.get("perplexity_ratio") is not None:
        section.verdict = (
            f"The locked model has {number(fidelity['perplexity_ratio'], '.4f')} times the original's perplexity, and "
            f"the same most likely token at {number(fidelity.get('top1_agreement'), '.1%')} of positions. This is its "
            "quality; an audit says what the lock is worth."
        )
    data = record.get("data", {})
    if data.get("train_tokens") is not None:
        section.text.append(
            f"Distilled on {data.get('source', 'unknown text')} ({number(data['train_tokens'])} tokens) in "
            f"{number(record.get('seconds'), ',.0f')} seconds."
        )
    if fidelity:
        section.text.append(measured_on(fidelity.get("text")))
    if others := record.get("other_texts"):
        figures = [
            [
                str(other.get("text", {}).get("source", "unknown text")),
                number(other.get("perplexity_ratio"), ".4f"),
                number(other.get("kl_divergence"), ".5f"),
                number(other.get("top1_agreement"), ".2%"),
            ]
            for other in others
        ]
        heads = [
            "text of another kind",
            "perplexity, locked / original",
            "KL, nats per token",
            "top-1 agreement",
        ]
        section.tables.append(Table(heads, figures))
    rows = [
        [str(layer["layer"]), number(layer.get("nmse"), ".5f"), number(layer.get("gain"), ".4g")] for layer in layers
    ]
    section.tables.append(Table(["layer", "NMSE after phase 1", "gain"], rows))
    points = [(layer["layer"], layer["nmse"]) for layer in layers if isinstance(layer.get("nmse"), int | float)]
    mean = ("mean", sum(value for _, value in points) / len(points)) if points else None
    section.curves.append(
        Curve("Error of each layer's chain", "layer", "NMSE", {"NMSE": points}, bars=True, level=mean)
    )
    section.facts = made_with(record)
    return [section]
