"""What `lockkit verify` measures, and the limits it sets: the only place for both."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Gates(BaseModel):
    """Limits an export must keep. None switches a gate off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_kl: float | None = Field(description="Highest mean KL(PyTorch || ONNX) per token, in nats, in every mode.")
    min_top1: float | None = Field(description="Lowest share of positions with the same top token, in every mode.")
    max_perplexity_ratio: float | None = Field(description="Highest perplexity of ONNX over the original's.")
    min_continuations: float | None = Field(
        description="Lowest share of greedy continuations that are identical, or part where the top tokens are tied."
    )


# The limits of each export precision.
#
# fp32: PyTorch and ONNX compute the same in another order and differ by rounding alone: KL is
# 1e-13 to 1e-12 on the tiny models and the bundled one. What the perplexity ratio leaves room
# for is the lock itself.
# fp16, bf16: 11 and 8 bits of mantissa; near-ties turn over, and greedy continuations part there.
# int8, int4: the weights are other numbers. On the bundled model KL is 6e-5 and 7e-3, top-1 0.99
# and 0.92, perplexity 1.0005 and 1.006 of the original; larger models lose more. The limits tell
# a working export from a broken one (KL of nats, top-1 near 0) and from a careless one; how much
# loss is acceptable is the owner's decision, so set them for your model.
DEFAULT_GATES: dict[str, Gates] = {
    "fp32": Gates(max_kl=1e-6, min_top1=0.999, max_perplexity_ratio=1.02, min_continuations=1.0),
    "fp16": Gates(max_kl=1e-3, min_top1=0.99, max_perplexity_ratio=1.02, min_continuations=None),
    "bf16": Gates(max_kl=1e-2, min_top1=0.97, max_perplexity_ratio=1.03, min_continuations=None),
    "int8": Gates(max_kl=1e-2, min_top1=0.97, max_perplexity_ratio=1.03, min_continuations=None),
    "int4": Gates(max_kl=2e-1, min_top1=0.80, max_perplexity_ratio=1.20, min_continuations=None),
}


def _by_precision(gate: str) -> str:
    def shown(value: float | None) -> str:
        return "off" if value is None else f"{value:g}"

    return ", ".join(f"{shown(getattr(gates, gate))} {name}" for name, gates in DEFAULT_GATES.items())


def _gate(gate: str) -> str:
    return f"{Gates.model_fields[gate].description} By default, by precision: {_by_precision(gate)}."


class VerifyConfig(BaseModel):
    """How to verify an export. Gates left at None take the export's precision's in `DEFAULT_GATES`."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(
        "auto",
        description="Held-out text: stdlib, a text file or folder, or a Hub dataset. auto takes the source "
        "the lock was distilled on (its lockkit.json says which), else stdlib. "
        "Always the split 'evaluate', which lockkit never distils on.",
    )
    tokens: int = Field(16_384, ge=2, description="Held-out tokens for perplexity and prefill parity.")
    block_tokens: int = Field(
        256, ge=8, description="Tokens in a row; at most the model's max_position_embeddings are used."
    )
    prompts: int = Field(8, ge=0, description="Greedy continuations to compare; 0 for none.")
    new_tokens: int = Field(32, ge=1, description="Tokens in a greedy continuation.")
    tie_tolerance: float = Field(
        1e-3, ge=0, description="Two top logits this close are a tie: continuations may part there."
    )
    provider: Literal["cpu", "cuda"] = Field("cpu", description="Where the ONNX graph runs.")
    seed: int = Field(0, description="Chooses the rows for the cache, padding and continuation checks.")
    max_kl: float | None = Field(None, ge=0, description=_gate("max_kl"))
    min_top1: float | None = Field(None, ge=0, description=_gate("min_top1"))
    max_perplexity_ratio: float | None = Field(None, ge=0, description=_gate("max_perplexity_ratio"))
    min_continuations: float | None = Field(None, ge=0, description=_gate("min_continuations"))

    def gates(self, precision: str) -> Gates:
        """The limits for an export of `precision`: those set here, else the defaults."""
        defaults = DEFAULT_GATES[precision].model_dump()
        return Gates(
            **{name: limit if (own := getattr(self, name)) is None else own for name, limit in defaults.items()}
        )
