"""Settings of `lockkit verify`. The gates are in figures.py, beside their figures."""

from __future__ import annotations

from pydantic import Field

from lockkit.settings import UserPath
from lockkit.targets import Provider
from lockkit.text import DataColumn
from lockkit.verify.figures import Gates


class VerifyConfig(Gates):
    """Settings of a verification. A gate of None has the default limit of the export's precision (lockkit/targets.py)."""

    data: UserPath = Field(
        "auto",
        description="Held-out text: `stdlib`, a file or folder as `lockkit lock --data` takes it, or a Hub dataset. `auto` is the source that the "
        "lock was distilled on, as its lockkit.json says, or else `stdlib`. Only the split 'evaluate' is used, which "
        "lockkit never distils on.",
    )
    data_column: DataColumn = None
    tokens: int = Field(16_384, ge=2, description="Held-out tokens for perplexity and prefill parity.")
    block_tokens: int = Field(
        256, ge=8, description="Tokens in a row. The model's max_position_embeddings is an upper limit."
    )
    prompts: int = Field(8, ge=0, description="Greedy continuations to compare; 0 for none.")
    new_tokens: int = Field(32, ge=1, description="Tokens in a greedy continuation.")
    tie_tolerance: float = Field(
        1e-3,
        ge=0,
        description="Two highest logits that differ by no more than this are a tie. Continuations may differ from there "
        "on.",
    )
    provider: Provider = Field(Provider.cpu, description="Execution provider that runs the ONNX graph.")
    seed: int = Field(0, description="Seed that chooses the rows for the cache, padding and continuation checks.")

    def unused(self) -> dict[str, str]:
        """Settings without an effect beside others: see `lockkit.settings.refuse_unused`."""
        reason = "with --prompts 0: leave it out, or change --prompts"
        return {} if self.prompts else dict.fromkeys(("new_tokens", "tie_tolerance", "min_continuations"), reason)
