"""Which settings are tried on which task. The rules keep a suite affordable and are the same for lock and original.

- The first variant of an attack is tried at every learning rate of the suite. The other variants are tried at the
  rate that was best for the first one on that model. Attacks that only save memory take exactly the baseline's steps,
  so they are tried at the baseline's best rate.
- An unlocked model is fine-tuned with the baseline. The models of the cheapest unlocks are also fine-tuned with the
  attacks that were cheapest on the original, because an attacker who has undone the lock uses those.
- On the other tasks, the baseline is tried, and the attacks that were cheapest on the first task in any resource.
  There, too, the models of the cheapest unlocks are fine-tuned with the attacks that were cheapest on the original.
- The cheapest attacks on a task, and the baseline, are repeated with more seeds.

With `exhaustive`, every attack is tried at every setting on every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from lockkit.attack.finetune import FinetuneConfig
from lockkit.attack.target import RESOURCES, WORK, Target, cheapest, seed_of, valid_runs

if TYPE_CHECKING:
    from lockkit.attack.bench import Subject

BASELINE = "full-ft"
SUBJECTS: tuple[Subject, ...] = ("original", "locked")
Settings = TypeVar("Settings", bound=BaseModel)


def without_rate(config: BaseModel) -> dict:
    """The settings that all trials of one variant have in common."""
    return config.model_dump(exclude={"learning_rate"})


def groups(trials: Sequence[Settings]) -> list[list[Settings]]:
    """Trials grouped by variant. The trials of a group differ in their learning rate only."""
    found: list[list[Settings]] = []
    for config in trials:
        for group in found:
            if without_rate(group[0]) == without_rate(config):
                group.append(config)
                break
        else:
            found.append([config])
    return found


def takes_baseline_steps(config: BaseModel) -> bool:
    """Whether these are the baseline's settings plus a memory saver: the same steps at another cost."""
    return type(config) is FinetuneConfig and config.saver != "none"


def best_position(rows: list[dict]) -> int:
    """Index of the row with the lowest loss; of the middle row if none has a loss."""
    losses = [(row["best_loss"], position) for position, row in enumerate(rows) if "best_loss" in row]
    return min(losses)[1] if losses else len(rows) // 2


def winners(rows: list[dict], task: str, target: Target, seed: int) -> list[dict]:
    """The cheapest valid run for each model and resource, and the baseline's, without repetition.

    Args:
        rows: all rows of the audit.
        seed: only runs with this seed are considered.
    """
    runs = [row for row in valid_runs(rows, task, target) if seed_of(row) == seed]
    found: dict[str, dict] = {}
    for subject in SUBJECTS:
        own = [row for row in runs if row["model"] == subject]
        candidates = [cheapest(own, target.loss, resource) for resource in RESOURCES]
        candidates.append(cheapest([row for row in own if row["attack"] == BASELINE], target.loss, "tokens"))
        found |= {best[1]["key"]: best[1] for best in candidates if best}
    return list(found.values())


def unlocks_and_finetunes(rows: list[dict], task: str, target: Target, seed: int) -> list[tuple[dict, dict]]:
    """Which unlocked models are fine-tuned with which other attacks.

    Returns:
        Pairs of rows: one of the cheapest valid unlocks (fine-tuned with the baseline), and one of the runs that were
        cheapest on the original.
    """
    runs = [row for row in valid_runs(rows, task, target) if seed_of(row) == seed]
    # Compared by work only: peak memory of the fine-tune does not depend on the unlock before it.
    undone = [row for row in runs if "unlock" in row["config"] and "finetune_attack" not in row["config"]]
    found = [best[1] for resource in WORK[1:] if (best := cheapest(undone, target.loss, resource))]
    unlocks = {row["key"]: row for row in found}.values()
    originals = [row for row in winners(rows, task, target, seed) if row["model"] == "original"]
    return [(unlock, row) for unlock in unlocks for row in originals if row["attack"] != BASELINE]
