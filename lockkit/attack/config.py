"""Settings of an audit, and the values of each suite.

A suite is a set of values. The option of a setting overrides the suite's value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.settings import UserPath, validated
from lockkit.text import DataColumn

Suite = Literal["quick", "standard", "full"]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SUITES: dict[str, dict[str, Any]] = {
    # A few attacks of each kind: in three minutes on two cores for a small model, in half an hour for one of 270 M.
    "quick": {
        "tasks": ["signatures"],
        "steps": 16,
        "batch_rows": 2,
        "block_tokens": 128,
        "held_out_tokens": 1_024,
        "evaluation_tokens": 1_024,
        "unlock_tokens": 6_144,
        "redistill_tokens": 12_288,
        "seeds": 1,
        "exhaustive": False,
        "sweep": 0,
        "stop_at_target": True,
    },
    # Enough for a published table. selection.py spends the trials where they can change the result.
    "standard": {
        "tasks": ["signatures", "docstrings"],
        "steps": 32,
        "batch_rows": 2,
        "block_tokens": 128,
        "held_out_tokens": 2_048,
        "evaluation_tokens": 4_096,
        "unlock_tokens": 32_768,
        "redistill_tokens": 65_536,
        "seeds": 5,
        "exhaustive": False,
        "sweep": 0,
        "stop_at_target": False,
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


def _of_suite(description: str, **limits: Any) -> Any:
    """A field without a default of its own: `audit_config` fills it from the suite."""
    return Field(description=f"{description} Default: the suite's.", **limits)


class AuditConfig(BaseModel):
    """Settings of `lockkit attack`. `audit_config` fills in the values of a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    suite: Suite = Field(
        "quick",
        description="`quick`: a few attacks of each kind. `standard`: every attack; the "
        "cheapest attacks also on a second task and with five seeds. `full`: every attack on both tasks, with larger "
        "budgets and searches over settings. Other options override single values of the suite.",
    )
    tasks: list[UserPath] = _of_suite(
        "Task to fine-tune on: `signatures`, `docstrings`, a file of chat messages, or text (as for --data; 10 % of "
        "its passages are used).",
        min_length=1,
    )
    steps: int = _of_suite("Steps of each fine-tuning run.", ge=8)
    batch_rows: int = _of_suite("Rows per step.", ge=1)
    block_tokens: int = _of_suite("Length of a row, in tokens.", ge=16)
    held_out_tokens: int = _of_suite("Held-out tokens of a task, on which the loss is measured.", ge=128)
    evaluation_tokens: int = _of_suite(
        "Tokens on which the perplexity and KL divergence of an unlocked model are measured.", ge=128
    )
    unlock_tokens: int = _of_suite("Unlabelled tokens for closed-form unlocks.", ge=256)
    redistill_tokens: int = _of_suite("Unlabelled tokens for re-distillations.", ge=256)
    redistill_budgets: list[_Positive] = Field(
        default=[],
        description="Training tokens of a re-distillation, as a multiple of the lock's own. The unlabelled tokens are "
        "read up to 8 times. Default: one pass over --redistill-tokens.",
    )
    learning_rates: list[_Positive] = Field(
        default=[],
        description="Learning rate that every gradient attack tries, on the original and on the lock. An attack may "
        "multiply it by a factor of its own. Default: a search for each attack and model, from 1e-6 to 1e-2.",
    )
    seeds: int = _of_suite("Number of seeds for the baseline and for the cheapest attacks on each task.", ge=1)
    exhaustive: bool = _of_suite(
        "Try every variant at every learning rate, and every attack on every task. Otherwise, "
        "lockkit/attack/selection.py says which trials are run."
    )
    sweep: int = _of_suite(
        "Trials of a search over the settings of each gradient attack, the same number on the original and on the "
        "lock; 0 for no search.",
        ge=0,
    )
    stop_at_target: bool = _of_suite("End a run when it has reached the target.")
    target_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the improvement of the reference (the original, fine-tuned) that an attack has to reach. "
        "It sets the target loss.",
    )
    target_loss: float | None = Field(
        None,
        gt=0,
        description="Target loss on the held-out rows of every task, in nats per label, in place of --target-share.",
    )
    utility_rise: float = Field(
        1.1,
        ge=1,
        description="A fine-tuned model keeps its utility if its perplexity on general text is at most this many times "
        "that of the model before.",
    )
    effective_depth_kl: float = Field(
        0.01,
        gt=0,
        description="Limit that defines effective depth: the fewest stages of a closed-form unlock whose KL divergence "
        "to the lock is at most this, in nats per token.",
    )
    data: UserPath = Field(
        "auto",
        description="Unlabelled text for unlocks and for measuring: `stdlib`, a file or folder as `lockkit lock --data` "
        "takes it, or a Hub dataset. "
        "`auto` takes the text that the lock was distilled on, or `stdlib` if the model wrote that text.",
    )
    data_column: DataColumn = None
    seed: int = Field(0, ge=0, le=2**32 - 1, description="First seed.")
    device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`, ...; `auto` uses a GPU if there is one.")


def audit_config(suite: str = "quick", **overrides: Any) -> AuditConfig:
    """The configuration of a suite. `overrides` maps field names to values; None and an empty list are ignored.

    Raises:
        UsageError: a setting is out of range; the message names its option.
    """
    given = {name: value for name, value in overrides.items() if value is not None and value != []}
    return validated(AuditConfig, {"suite": suite} | SUITES.get(suite, SUITES["quick"]) | given)
