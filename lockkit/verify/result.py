"""The result of a verification, and the schema of `lockkit verify --json`.

`VerifyResult.model_json_schema()` returns the schema as JSON Schema. Figures that are not finite (for example, if an
export computes NaN) are written as null and never pass a gate. The name `lockkit-verify/1` changes when a field is
renamed or removed, or changes its meaning. New fields may appear under the same name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from lockkit.files import write_text
from lockkit.measure.records import Fidelity, MeasuredText, Record
from lockkit.verify.config import VerifyConfig
from lockkit.verify.figures import Continuations, GateOutcome, Parity, PerplexityFigures


class VerifyResult(Record):
    """The result of a verification."""

    schema_version: Literal["lockkit-verify/1"] = Field(
        "lockkit-verify/1", alias="schema", description="Name of this schema."
    )
    passed: bool = Field(description="All gates passed.")
    export: str = Field(description="The export's folder, as given.")
    manifest_sha256: str = Field(description="SHA-256 of the export's manifest, which lists those of its files.")
    source_sha256: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of each weight file of the exported model, from the manifest."
    )
    precision: str = Field(description="Precision of the export's weights.")
    provider: str = Field(description="Execution provider that ran the graph, by its name in onnxruntime.")
    original: str | None = Field(description="The original model, as given.")
    locked: str | None = Field(description="The locked model, as given.")
    compared_with: Literal["original", "locked"] = Field(description="The PyTorch model of the parity figures.")
    same_weights: bool = Field(
        description="That model's weight files are, byte for byte, those that were exported according to the manifest."
    )
    text: MeasuredText = Field(description="The text that everything was measured on.")
    parity: list[Parity]
    continuations: Continuations | None = Field(description="null if none were asked for.")
    perplexity: PerplexityFigures
    fidelity: Fidelity | None = Field(
        description="Of the locked model to the original, both in PyTorch; null unless both references were given."
    )
    gates: list[GateOutcome]
    config: VerifyConfig = Field(description="The settings.")
    versions: dict[str, str] = Field(description="Versions of lockkit, Python and libraries.")
    git_hash: str | None = Field(description="Commit of lockkit, if it ran from a checkout.")
    created: str = Field(description="Date and time of the verification, in UTC, ISO 8601.")
    seconds: float = Field(description="Wall time, loading included.")

    @property
    def failed_gates(self) -> list[GateOutcome]:
        """The gates that failed."""
        return [outcome for outcome in self.gates if not outcome.passed]

    def write(self, path: Path) -> None:
        """Write the result as JSON, atomically."""
        write_text(path, self.model_dump_json(indent=2, by_alias=True) + "\n")
