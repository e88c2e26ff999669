"""Which settings are tried where, so that a suite stays affordable and both sides get the same trials.

- An attack's first variant is tried at every learning rate of the suite. The others are tried at the rate
  that was best for the first on that model. Attacks that only save memory take exactly the baseline's steps,
  and are tried at its best rate.
- An unlocked model is fine-tuned with the baseline. The models of the cheapest unlocks are also fine-tuned with the
  attacks that were cheapest on the original: an attacker who has undone the lock uses whatever is cheapest there.
- Other tasks than the first get the baseline and the attacks that were cheapest on the first, in any resource; and,
  as above, the cheapest unlocks on that task with the attacks that were cheapest on the original on that task.
- The cheapest attacks on a task, and the baseline, are repeated with more seeds.

`exhaustive` tries everything everywhere instead.
"""

from __future__ import annotations

from pydantic import BaseModel

from lockkit.attack.finetune import FinetuneConfig
from lockkit.attack.target import RESOURCES, WORK, Target, cheapest, seed_of, valid_runs

BASELINE = "full-ft"
SUBJECTS = ("original", "locked")


def without_rate(config: BaseModel) -> dict:
    """Settings that all trials of one variant share."""
    return config.model_dump(exclude={"learning_rate"})


def groups(trials: list[BaseModel]) -> list[list[BaseModel]]:
    """Trials by variant: those of a group differ in their learning rate only."""
    found: list[list[BaseModel]] = []
    for config in trials:
        for group in found:
            if without_rate(group[0]) == without_rate(config):
                group.append(config)
                break
        else:
            found.append([config])
    return found


def takes_baseline_steps(config: BaseModel) -> bool:
    """Whether these are the baseline's settings with a memory saver: the same steps at another cost."""
    return type(config) is FinetuneConfig and config.saver != "none"


def best_position(rows: list[dict]) -> int:
    """Which of the rows ended lowest; the middle one if none has a loss."""
    losses = [(row["best_loss"], position) for position, row in enumerate(rows) if "best_loss" in row]
    return min(losses)[1] if losses else len(rows) // 2


def winners(rows: list[dict], task: str, target: Target, seed: int) -> list[dict]:
    """The cheapest valid run for each model and resource, and the baseline's, each once; first seed only."""
    runs = [row for row in valid_runs(rows, task, target) if seed_of(row) == seed]
    found: dict[str, dict] = {}
    for subject in SUBJECTS:
        own = [row for row in runs if row["model"] == subject]
        candidates = [cheapest(own, target.loss, resource) for resource in RESOURCES]
        candidates.append(cheapest([row for row in own if row["attack"] == BASELINE], target.loss, "tokens"))
        found |= {best[1]["key"]: best[1] for best in candidates if best}
    return list(found.values())


def unlocks_and_finetunes(rows: list[dict], task: str, target: Target, seed: int) -> list[tuple[dict, dict]]:
    """Pairs of rows: the cheapest valid unlocks, fine-tuned with the baseline, and what was cheapest on the original."""
    runs = [row for row in valid_runs(rows, task, target) if seed_of(row) == seed]
    # By work alone: the same fine-tune has the same peak of memory, whatever unlock came before.
    undone = [row for row in runs if "unlock" in row["config"] and "finetune_attack" not in row["config"]]
    found = [best[1] for resource in WORK[1:] if (best := cheapest(undone, target.loss, resource))]
    unlocks = {row["key"]: row for row in found}.values()
    originals = [row for row in winners(rows, task, target, seed) if row["model"] == "original"]
    return [(unlock, row) for unlock in unlocks for row in originals if row["attack"] != BASELINE]
