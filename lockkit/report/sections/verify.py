"""A verification in a report: parity and gates."""

from __future__ import annotations

from pathlib import Path

from lockkit.report.page import Section, Table, measured_on, number
from lockkit.report.sections import reports


@reports("lockkit-verify/1", place=2)
def verify_sections(record: dict, path: Path) -> list[Section]:
    """The section from the JSON of `lockkit verify`. Missing entries are left out."""
    name = str(record.get("export", "an export")).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    passed = record.get("passed")
    ratios = record.get("perplexity", {})
    section = Section(f"Verification of {name}: {'passed' if passed else 'FAILED'}")
    section.figures = [
        ("precision", str(record.get("precision", "–"))),
        ("perplexity, ONNX over original", number(ratios.get("onnx_over_original"), ".4f")),
        ("perplexity, ONNX over locked", number(ratios.get("onnx_over_locked"), ".4f")),
    ]
    if fidelity := record.get("fidelity"):
        section.figures += [
            ("KL of the lock to the original, nats per token", number(fidelity.get("kl_divergence"), ".5f")),
            ("same most likely token, original and lock", number(fidelity.get("top1_agreement"), ".2%")),
        ]
    section.text.append(measured_on(record.get("text")))
    section.tables.append(
        Table(
            ["way of running", "tokens", "KL, nats", "same top-1", "largest difference"],
            [
                [
                    row["mode"],
                    number(row["tokens"]),
                    number(row["kl_divergence"], ".2e"),
                    number(row["top1_agreement"], ".2%"),
                    number(row["max_difference"], ".2e"),
                ]
                for row in record.get("parity", [])
            ],
        )
    )
    section.tables.append(
        Table(
            ["gate", "figure", "value", "limit", "outcome"],
            [
                [
                    row["gate"],
                    row["figure"],
                    number(row["value"]),
                    number(row["limit"]),
                    "passed" if row["passed"] else "FAILED",
                ]
                for row in record.get("gates", [])
            ],
        )
    )
    return [section]
