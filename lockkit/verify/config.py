"""Settings of `lockkit verify`. The limits are in figures.py, beside the figures they hold."""

from __future__ import annotations

from pydantic import Field

from lockkit.targets import Provider
from lockkit.verify.figures import Gates


class VerifyConfig(Gates):
    """How to verify an export. Gates left at None take the limits of the export's precision (lockkit/targets.py)."""

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
    provider: Provider = Field(Provider.cpu, description="Where the ONNX graph runs.")
    seed: int = Field(0, description="Chooses the rows for the cache, padding and continuation checks.")
