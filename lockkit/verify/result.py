"""The result of a verification, and the documented schema of `lockkit verify --json`.

`VerifyResult.model_json_schema()` is the schema in JSON Schema's own words. Figures that are
not finite (an export that computes NaN, say) are written as null, and never pass a gate.
The text `lockkit-verify/1` changes whenever a field is renamed, removed or changes its meaning;
fields may be added without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from lockkit.files import write_text
from lockkit.measure.records import Fidelity, MeasuredText, Record
from lockkit.verify.config import VerifyConfig
from lockkit.verify.figures import Continuations, GateOutcome, Parity, PerplexityFigures

SCHEMA = "lockkit-verify/1"


class VerifyResult(Record):
    """Everything `lockkit verify` found."""

    schema_version: Literal["lockkit-verify/1"] = Field(SCHEMA, alias="schema", description="Name of this schema.")
    passed: bool = Field(description="All gates passed.")
    export: str = Field(description="The export's folder, as given.")
    manifest_sha256: str = Field(description="SHA-256 of the export's manifest, which holds those of its files.")
    precision: str = Field(description="Precision of the export's weights.")
    provider: str = Field(description="Where onnxruntime really ran the graph.")
    original: str | None = Field(description="The original model, as given.")
    locked: str | None = Field(description="The locked model, as given.")
    compared_with: Literal["original", "locked"] = Field(description="The PyTorch model of the parity figures.")
    same_weights: bool = Field(
        description="That model's weight files are, byte for byte, those the manifest names as exported."
    )
    text: MeasuredText = Field(description="The text everything was measured on.")
    parity: list[Parity]
    continuations: Continuations | None = Field(description="null if none were asked for.")
    perplexity: PerplexityFigures
    fidelity: Fidelity | None = Field(
        description="Of the lock to the original, both in PyTorch; null unless both references were given."
    )
    gates: list[GateOutcome]
    config: VerifyConfig = Field(description="What was asked for.")
    versions: dict[str, str] = Field(description="Versions of lockkit, Python and libraries.")
    git_hash: str | None = Field(description="Commit of lockkit, where it ran from a checkout.")
    created: str = Field(description="When, in UTC, ISO 8601.")
    seconds: float = Field(description="How long it took, loading included.")

    @property
    def failed_gates(self) -> list[GateOutcome]:
        return [outcome for outcome in self.gates if not outcome.passed]

    def write(self, path: Path) -> None:
        """Write the result as JSON; `path` is either complete or as it was before."""
        write_text(path, self.model_dump_json(indent=2, by_alias=True) + "\n")
