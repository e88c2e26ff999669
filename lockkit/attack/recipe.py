"""A recipe: one attack of an audit with its settings, as a file that runs it again.

An audit writes the recipe of the run on the lock that needed the fewest operations to reach the target. Running it again
takes the target from the recipe, so nothing runs on the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from lockkit.attack.target import Target, cheapest, cost_to_target, run_name, valid_runs
from lockkit.errors import UsageError
from lockkit.files import read_json
from lockkit.measure.records import Figure, Record

if TYPE_CHECKING:
    from lockkit.attack.subjects import Subjects

SCHEMA = "lockkit-attack-recipe/1"
FILE = "recipe.json"


class Recipe(Record):
    """One attack with its settings."""

    schema_version: str = Field(SCHEMA, alias="schema", description="Version of this format.")
    attack: str = Field(description="Name of the attack.")
    settings: dict[str, Any] = Field(description="Its settings; of an unlock also those of the fine-tune that follows.")
    task: str = Field(description="The task, as given to --task.")
    start_loss: Figure = Field(description="Held-out loss of the original before fine-tuning, nats per label.")
    reference_loss: Figure = Field(description="Lowest held-out loss of the reference.")
    target_loss: Figure = Field(description="The loss to reach.")
    tokens: Figure = Field(description="Tokens that the run spent to reach it.")
    config: dict[str, Any] = Field(description="Settings of the audit.")
    locked_sha256: str = Field(description="Hash of the weights of the lock.")

    @property
    def target(self) -> Target:
        """The target of the task."""
        return Target(self.start_loss, self.reference_loss, self.target_loss)


def best_recipe(subjects: Subjects, rows: list[dict], targets: dict[str, Target]) -> Recipe | None:
    """The recipe of the run on the lock that was cheapest in operations on the first task; None if none reached it."""
    task = next(iter(subjects.tasks))
    target = targets[task]
    runs = [row for row in valid_runs(rows, task, target) if row["model"] == "locked"]
    best = cheapest(runs, target.loss, "flops")
    if best is None:
        return None
    row = best[1]
    cost = cost_to_target(row, target.loss)
    assert cost is not None, "the run reached the target"
    return Recipe(
        attack=row["attack"],
        settings=row["config"],
        task=task,
        start_loss=target.start,
        reference_loss=target.best,
        target_loss=target.loss,
        tokens=cost["tokens"],
        config=subjects.config.model_dump(),
        locked_sha256=subjects.hashes["locked"],
    )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: it cannot be read or is no recipe.
    """
    try:
        return Recipe.model_validate(read_json(path, "--recipe"))
    except ValidationError as error:
        raise UsageError(f"{path} is not the {FILE} of an audit: change --recipe") from error


def outcome(recipe: Recipe, row: dict[str, Any]) -> str:
    """What came of running a recipe again, in one sentence."""
    if "best_loss" not in row:
        return f"{run_name(row)}: {row['status']} ({row['note']})"
    cost = cost_to_target(row, recipe.target_loss)
    if cost is None:
        return f"{run_name(row)}: held-out loss {row['best_loss']:.3f}, the target {recipe.target_loss:.3f} was not reached"
    return (
        f"{run_name(row)}: held-out loss {recipe.target_loss:.3f} reached after {cost['tokens']:,.0f} tokens; in the recipe "
        f"after {recipe.tokens:,.0f}"
    )
