"""Settings of an audit, and what each suite sets them to.

A suite is nothing but a set of values: every one can be overridden by its option.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.settings import validated

Suite = Literal["quick", "standard", "full"]

SUITES: dict[str, dict[str, Any]] = {
    # Every family once, in a few minutes on two cores.
    "quick": {
        "tasks": ["signatures"],
        "steps": 16,
        "batch_rows": 2,
        "block_tokens": 128,
        "held_out_tokens": 2_048,
        "evaluation_tokens": 2_048,
        "unlock_tokens": 6_144,
        "redistill_tokens": 12_288,
        "learning_rates": [1e-3],
        "seeds": 1,
    },
    # What a table needs, in the order of selection.py, which spends trials where they can change the result.
    "standard": {
        "tasks": ["signatures", "docstrings"],
        "steps": 32,
        "batch_rows": 2,
        "block_tokens": 128,
        "held_out_tokens": 2_048,
        "evaluation_tokens": 4_096,
        "unlock_tokens": 32_768,
        "redistill_tokens": 65_536,
        "learning_rates": [1e-4, 3e-4, 1e-3],
        "seeds": 5,
    },
}
SUITES["full"] = SUITES["standard"] | {
    "steps": 128,
    "batch_rows": 8,
    "unlock_tokens": 65_536,
    "redistill_tokens": 1_000_000,
    "exhaustive": True,
    "sweep": 16,
}


class AuditConfig(BaseModel):
    """Settings of `lockkit attack`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    suite: Suite = Field(
        "quick",
        description="`quick` tries every family of attacks once; `standard` every attack, several learning rates, and "
        "what was cheapest on a second task and with five seeds; `full` everything on both tasks, with sweeps. "
        "Other options override what the suite sets.",
    )
    tasks: list[str] = Field(
        min_length=1,
        description="What to fine-tune on: `signatures`, `docstrings`, a chat-format .jsonl, or a text file, folder or Hub "
        "dataset (10 % of its passages). Default: the suite's.",
    )
    steps: int = Field(ge=8, description="Steps of each fine-tuning run.")
    batch_rows: int = Field(ge=1, description="Rows in a step.")
    block_tokens: int = Field(ge=16, description="Length of a row, in tokens.")
    held_out_tokens: int = Field(ge=128, description="Tokens of a task that measure, and never train.")
    evaluation_tokens: int = Field(ge=128, description="Tokens that measure perplexity and KL of an unlocked model.")
    unlock_tokens: int = Field(ge=256, description="Unlabelled tokens for closed-form unlocks.")
    redistill_tokens: int = Field(ge=256, description="Tokens of a re-distillation, at most.")
    redistill_budgets: list[float] = Field(
        default=[],
        description="Tokens of a re-distillation, in multiples of what the lock took; text is read up to 8 times. "
        "Default: --redistill-tokens.",
    )
    learning_rates: list[float] = Field(
        min_length=1,
        description="Learning rate that every gradient attack tries, on the original as on the lock. Default: the suite's.",
    )
    seeds: int = Field(ge=1, description="Seeds of headline rows: what was cheapest on a task, and the baseline.")
    exhaustive: bool = Field(
        False,
        description="Every variant at every learning rate, every attack on every task; else as lockkit/attack/selection.py says.",
    )
    sweep: int = Field(
        0,
        ge=0,
        description="Trials of a search over each gradient attack's settings, as many on the original as on the lock.",
    )
    target_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="The target is the held-out loss at this share of the improvement that the reference fine-tune of "
        "the original reaches.",
    )
    effective_depth_kl: float = Field(
        0.01,
        gt=0,
        description="Effective depth: the fewest stages whose collapse stays within this KL to the lock, nats per token.",
    )
    data: str = Field(
        "auto", description="Unlabelled text for unlocks and for measuring; `auto` is what the lock was distilled on."
    )
    seed: int = Field(0, ge=0, description="First seed.")
    device: str = Field("auto", description="`cpu`, `cuda`, ...; `auto` takes a GPU if there is one.")


def audit_config(suite: str = "quick", **overrides: Any) -> AuditConfig:
    """The configuration of a suite, with overrides; those that are None count as not given.

    Raises:
        UsageError: naming the option that is out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None and value != []}
    return validated(AuditConfig, {"suite": suite} | SUITES.get(suite, SUITES["quick"]) | given)
