"""The result of a verification, and the documented schema of `lockkit verify --json`.

`VerifyResult.model_json_schema()` is the schema in JSON Schema's own words. Figures that are
not finite (an export that computes NaN, say) are written as null, and never pass a gate.
The text `lockkit-verify/1` changes whenever a field is renamed, removed or changes its meaning;
fields may be added without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.files import write_text
from lockkit.verify.config import VerifyConfig

SCHEMA = "lockkit-verify/1"
Mode = Literal["prefill", "cache_tokens", "cache_chunk", "padded_batch"]

# NaN and infinities become null, and null is accepted when a result is read back.
Figure = Annotated[float | None, Field(allow_inf_nan=True)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null", validate_by_name=True, validate_by_alias=True)


class Parity(_Record):
    """How far the ONNX graph's logits are from PyTorch's, in one way of running it."""

    mode: Mode = Field(
        description="prefill: whole rows, no cache. cache_tokens: a prefix, then token by token. "
        "cache_chunk: a prefix, then the rest but one at once, then the last token. "
        "padded_batch: rows of unequal lengths in one batch and one more token each, real positions only."
    )
    tokens: int = Field(description="Positions compared.")
    max_difference: Figure = Field(description="Largest absolute difference of two logits.")
    mean_difference: Figure = Field(description="Mean absolute difference of logits.")
    kl_divergence: Figure = Field(description="Mean KL(PyTorch || ONNX) per token, nats, computed in float64.")
    top1_agreement: Figure = Field(description="Share of positions with the same highest logit, 0 to 1.")


class Parting(_Record):
    """Where one greedy continuation of ONNX parts from PyTorch's."""

    prompt: int = Field(description="Number of the prompt, from 0.")
    position: int = Field(description="Number of the first generated token that differs, from 0.")
    gap: Figure = Field(description="PyTorch's logit of its own token there, minus that of the token ONNX chose.")
    tied: bool = Field(description="The gap is within the configuration's tie_tolerance.")


class Continuations(_Record):
    """Greedy continuations of the same prompts, with the cache, by PyTorch and by ONNX."""

    prompts: int = Field(description="Continuations compared.")
    prompt_tokens: int = Field(description="Tokens in each prompt.")
    new_tokens: int = Field(description="Tokens generated for each; an end-of-text token does not end them.")
    identical: Figure = Field(description="Share of continuations that are identical, 0 to 1.")
    identical_or_tied: Figure = Field(description="Share identical, or parting at a tie, 0 to 1.")
    partings: list[Parting] = Field(description="One for each continuation that is not identical.")


class PerplexityFigures(_Record):
    """Perplexity on the same held-out tokens, and its ratios; null where a model was not given."""

    predictions: int = Field(description="Next-token predictions counted: all but the first of every row.")
    original: Figure = Field(description="Of the original PyTorch model.")
    locked: Figure = Field(description="Of the locked PyTorch model.")
    onnx: Figure = Field(description="Of the ONNX graph.")
    locked_over_original: Figure = Field(description="Ratio of perplexities.")
    onnx_over_original: Figure = Field(description="Ratio of perplexities.")
    onnx_over_locked: Figure = Field(description="Ratio of perplexities.")


class Fidelity(_Record):
    """How well the lock kept the original, both in PyTorch. Reported, without a gate of its own."""

    tokens: int = Field(description="Positions compared.")
    kl_divergence: Figure = Field(description="Mean KL(original || locked) per token, nats.")
    top1_agreement: Figure = Field(description="Share of positions with the same highest logit, 0 to 1.")


class HeldOutText(_Record):
    """The text everything was measured on."""

    source: str = Field(description="stdlib, a file or folder, or a Hub dataset.")
    split: str = Field(description="The part of the source; lockkit never distils on 'evaluate'.")
    rows: int = Field(description="Rows of tokens, without padding.")
    block_tokens: int = Field(description="Tokens in a row.")
    token_sha256: str = Field(description="SHA-256 of all token ids, row by row, as little-endian int64.")


class GateOutcome(_Record):
    """One limit, and whether it was kept."""

    gate: str = Field(description="Name of the gate in the configuration.")
    figure: str = Field(description="What was measured: a mode, or what the ratio is over.")
    value: Figure = Field(description="The figure; null if it is not finite.")
    limit: Figure = Field(description="The limit; null if it is infinite.")
    passed: bool = Field(description="A figure that is not finite never passes.")


class VerifyResult(_Record):
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
    text: HeldOutText
    parity: list[Parity]
    continuations: Continuations | None = Field(description="null if none were asked for.")
    perplexity: PerplexityFigures
    fidelity: Fidelity | None = Field(description="null unless both references were given.")
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
