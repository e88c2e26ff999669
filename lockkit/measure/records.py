"""The records of a measurement, as written to JSON. Imports no PyTorch.

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
    """Base class of everything in a result."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null", validate_by_name=True, validate_by_alias=True)

    def record(self) -> dict[str, Any]:
        """The record as JSON values, with null for figures that are not finite."""
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
        """The description of token ids, `[rows, block]`.

        Args:
            rows: the token ids.
            source: public name of the text.
            split: its split; None if the text was sampled from the original.
        """
        return cls(
            source=source,
            split=split,
            rows=len(rows),
            block_tokens=rows.shape[1],
            token_sha256=rows_sha256(rows),
        )

    @property
    def tokens(self) -> int:
        """Tokens in all rows. One per row, the first, is not predicted."""
        return self.rows * self.block_tokens

    def __str__(self) -> str:
        """Size and origin of the text, in words."""
        if self.split is None:
            return f"{self.tokens:,} tokens sampled from the original itself"
        return f"{self.tokens:,} tokens of {self.source}, split '{self.split}'"


class Fidelity(Record):
    """How close a model is to the original, over all predicted tokens."""

    tokens: int = Field(description="Predicted tokens: all but the first of every row.")
    kl_divergence: Figure = Field(description="Mean KL(original || model) per token, nats.")
    top1_agreement: Figure = Field(description="Share of predictions with the same most likely token, 0 to 1.")
    perplexity: Figure = Field(description="Of the model, per token.")
    original_perplexity: Figure = Field(description="Of the original, per token.")
    perplexity_ratio: Figure = Field(description="The model's perplexity divided by the original's.")
    text: MeasuredText = Field(description="The text that the figures were measured on.")
