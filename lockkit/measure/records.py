"""The records of a measurement, as they are written to JSON. Imports no PyTorch.

Figures that are not finite are written as null and read back as NaN.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from lockkit.text import rows_sha256

if TYPE_CHECKING:
    import torch


def _nan_for_null(value: Any) -> Any:
    return math.nan if value is None else value


Figure = Annotated[
    float,
    BeforeValidator(_nan_for_null),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]


class Record(BaseModel):
    """A part of a result."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null", validate_by_name=True, validate_by_alias=True)

    def record(self) -> dict[str, Any]:
        """The record as it is written to JSON: names and plain values, null for what is not finite."""
        return json.loads(self.model_dump_json(by_alias=True))


class MeasuredText(Record):
    """The text that figures were measured on."""

    source: str = Field(description="Public name: stdlib, a file or folder, a Hub dataset, or self.")
    split: str | None = Field(
        description="The part of the source; lockkit never distils on 'evaluate'. null: sampled from the original."
    )
    rows: int = Field(description="Rows of tokens, without padding.")
    block_tokens: int = Field(description="Tokens in a row.")
    token_sha256: str = Field(description="SHA-256 of all token ids, row by row, as little-endian int64.")

    @classmethod
    def of(cls, rows: torch.Tensor, source: str, split: str | None) -> MeasuredText:
        """Describe token ids `[rows, block]` of a source, given by its public name."""
        sizes = {"rows": len(rows), "block_tokens": rows.shape[1]}
        return cls(source=source, split=split, token_sha256=rows_sha256(rows), **sizes)

    @property
    def tokens(self) -> int:
        """Tokens in all rows. One less per row is predicted."""
        return self.rows * self.block_tokens

    def __str__(self) -> str:
        """For a reader: how much text, and from where."""
        if self.split is None:
            return f"{self.tokens:,} tokens sampled from the original itself"
        return f"{self.tokens:,} tokens of {self.source}, split '{self.split}'"


class Fidelity(Record):
    """How well a model keeps the original, over all positions that predict a token of their row."""

    tokens: int = Field(description="Predictions counted: all tokens but the first of every row.")
    kl_divergence: Figure = Field(description="Mean KL(original || model) per token, nats.")
    top1_agreement: Figure = Field(description="Share of predictions with the same most likely token, 0 to 1.")
    perplexity: Figure = Field(description="Of the model, per token.")
    original_perplexity: Figure = Field(description="Of the original, per token.")
    perplexity_ratio: Figure = Field(description="The model's perplexity over the original's.")
    text: MeasuredText = Field(description="The text they were measured on.")
