"""Which settings are tried on which task. The rules keep a suite affordable and are the same for lock and original.

- The learning rate of the first variant of an attack is searched on each model (rates.py). The other variants are tried
  at the rate that was best for the first one on that model. Attacks that only save memory take exactly the baseline's
  steps, so they are tried at the baseline's best rate; scripts off the shelf, at that of the attack they correspond to.
  In the suite `quick`, attention-only fine-tuning, too, is tried at the baseline's best rate.
- The runs that set the target are also those of the baseline on the original.
- An unlocked model is fine-tuned with the baseline. The models of the cheapest unlocks (in operations, tokens and
  seconds; in the suite `quick` only in operations) are also fine-tuned with the attacks that were cheapest on the
  original and with LoRA, because an attacker who has undone the lock uses those.
- On the other tasks, the baseline is tried, and the attacks that were cheapest on the first task in any resource.
  There, too, the models of the cheapest unlocks are fine-tuned with the attacks that were cheapest on the original.
- The cheapest attacks on a task, and the baseline, are repeated with more seeds.

With `exhaustive`, every attack is tried at every setting on every task.
"""

from __future__ import annotations

from pydantic import BaseModel

from lockkit.attack.finetune import FinetuneConfig
from lockkit.attack.subjects import SUBJECTS
from lockkit.attack.target import RESOURCES, WORK, Target, cheapest, seed_of, valid_runs

BASELINE = "full-ft"
LORA = "lora"


def without_rate(config: BaseModel) -> dict:
    """The settings that all trials of one variant have in common."""
    return config.model_dump(exclude={"learning_rate", "stop_loss", "most_steps"})


def takes_baseline_steps(config: BaseModel) -> bool:
    """Whether these are the baseline's settings plus a memory saver: the same steps at another cost."""
    return type(config) is FinetuneConfig and config.saver != "none"


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


def unlocks_and_finetunes(
    rows: list[dict], task: str, target: Target, seed: int, *, one_unlock: bool = False
) -> list[tuple[dict, dict]]:
    """Which unlocked models are fine-tuned with which other attacks.

    Args:
        one_unlock: only the unlock that is cheapest in operations.

    Returns:
        Pairs of rows: one of the cheapest valid unlocks (fine-tuned with the baseline), and one of the runs that were
        cheapest on the original, or the cheapest with LoRA.
    """
    runs = [row for row in valid_runs(rows, task, target) if seed_of(row) == seed]
    # Compared by work only: peak memory of the fine-tune does not depend on the unlock before it.
    undone = [row for row in runs if "unlock" in row["config"] and "finetune_attack" not in row["config"]]
    resources = WORK[1:2] if one_unlock else WORK[1:]
    found = [best[1] for resource in resources if (best := cheapest(undone, target.loss, resource))]
    unlocks = {row["key"]: row for row in found}.values()
    chosen = [row for row in winners(rows, task, target, seed) if row["model"] == "original"]
    lora = [row for row in runs if row["model"] == "original" and row["attack"] == LORA]
    if not any(row["attack"] == LORA for row in chosen) and (best := cheapest(lora, target.loss, WORK[1])):
        chosen.append(best[1])
    return [(unlock, row) for unlock in unlocks for row in chosen if row["attack"] != BASELINE]
