"""A lock in a report: its fidelity and the error of each layer."""

from __future__ import annotations

from pathlib import Path

from lockkit.report.page import Curve, Section, Table, measured_on, number
from lockkit.report.sections import reports


@reports("lockkit-lock/2", place=1)
def lock_sections(record: dict, path: Path) -> list[Section]:
    """The section from `lockkit.json`. Missing entries are left out."""
    fidelity, dlr, layers = record.get("fidelity", {}), record.get("dlr", {}), record.get("layers", [])
    section = Section(f"Lock of {record.get('model', 'a model')}")
    section.figures = [
        ("perplexity, locked over original", number(fidelity.get("perplexity_ratio"), ".4f")),
        ("perplexity, locked", number(fidelity.get("perplexity"), ".3f")),
        ("perplexity, original", number(fidelity.get("original_perplexity"), ".3f")),
        ("KL to the original, nats per token", number(fidelity.get("kl_divergence"), ".5f")),
        ("same most likely token", number(fidelity.get("top1_agreement"), ".2%")),
        ("depth", number(dlr.get("depth"))),
    ]
    data = record.get("data", {})
    section.text.append(
        f"Distilled on {data.get('source', 'unknown text')} ({number(data.get('train_tokens'))} tokens); "
        f"{number(record.get('seconds'), '.0f')} seconds. {measured_on(fidelity.get('text'))}"
    )
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
            "perplexity, locked over original",
            "KL, nats per token",
            "same most likely token",
        ]
        section.tables.append(Table(heads, figures))
    rows = [
        [str(layer["layer"]), number(layer.get("nmse"), ".5f"), number(layer.get("gain"), ".4g")] for layer in layers
    ]
    section.tables.append(Table(["layer", "NMSE after phase 1", "gain"], rows))
    points = [(layer["layer"], layer["nmse"]) for layer in layers if isinstance(layer.get("nmse"), int | float)]
    section.curves.append(Curve("Error of each layer's chain", "layer", "NMSE", {"NMSE": points}, bars=True))
    return [section]
