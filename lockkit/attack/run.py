"""The audit: from two model folders to rows and a summary.

1. Load the models, tasks and text, and check that they match (bench.py).
2. References: fine-tune the original with the baseline at every learning rate. The best of these runs
   sets the target loss of a task.
3. Run every attack on the first task, on the original (positive control) and on the lock, at the settings that
   selection.py chooses. Each unlock first runs on the original rewritten as a chain (positive control), then on
   the lock (unlocking.py). The unlocked model is fine-tuned with the baseline. The models of the cheapest unlocks are
   also fine-tuned with the attacks that were cheapest on the original. The cost of the unlock is added to each.
4. With `sweep`, search over the settings of each gradient attack on that task, with the same number of trials on
   both models (sweep.py).
5. Run the cheapest attacks of the first task on the other tasks.
6. Repeat the cheapest attacks, in any resource, with more seeds.
7. Write `summary.json`: targets, headline, figures of the lock, what was not tried (summary.py).

Each run is a row (rows.py), written as soon as the run ends. An interrupted audit resumes after its last row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lockkit.attack.base import Attack, GradientAttack, Probe, UnlockAttack
from lockkit.attack.bench import Bench, Subject
from lockkit.attack.config import AuditConfig
from lockkit.attack.cost import Cost
from lockkit.attack.finetune import FinetuneConfig, FinetuneResult
from lockkit.attack.registry import attack_class, gradient_attack, registry
from lockkit.attack.rows import ROWS, RowStore, check_controls, depends_on, finite, head_of
from lockkit.attack.selection import (
    BASELINE,
    SUBJECTS,
    best_position,
    groups,
    takes_baseline_steps,
    unlocks_and_finetunes,
    winners,
    without_rate,
)
from lockkit.attack.summary import summarise
from lockkit.attack.sweep import Sweep
from lockkit.attack.target import NOT_FINITE, Target, reference_target, run_name
from lockkit.attack.unlocking import control, unlock
from lockkit.errors import UsageError
from lockkit.files import readable_disk_errors, write_json
from lockkit.output_folders import check_results_folder, content
from lockkit.progress import NoProgress, Progress

SUMMARY = "summary.json"


def run_audit(
    locked: str,
    original: str,
    out: Path,
    config: AuditConfig,
    attacks: list[str] | None = None,
    controls: list[Path] | None = None,
    progress: Progress | None = None,
) -> dict:
    """Attack a lock and write rows and summary to `out`.

    Args:
        locked: folder of the lock.
        original: the model it was made from: a folder, a Hub id or `demo`.
        out: folder of the audit. If it holds an interrupted audit, that is resumed.
        attacks: names of attacks; by default those of the suite.
        controls: folders of other audits, whose rows of the original are reused where they fit.

    Returns:
        The summary. Figures that are not finite are None in it.

    Raises:
        UsageError: models, tasks, attacks, `controls` or `out` cannot be used as given.
    """
    chosen = [attack_class(name) for name in attacks] if attacks else _of_suite(config)
    chosen.sort(key=lambda attack: attack.name != BASELINE)  # first, because others depend on its best learning rate
    check_controls(controls or [])
    check_results_folder(out, "--out")
    if out.exists() and content(out) and not (out / ROWS).is_file():
        raise UsageError(f"{out} exists and is not an audit that can be resumed: change --out")
    bench = Bench(locked, original, config)
    with readable_disk_errors(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        audit = Audit(bench, out, controls or [], progress or NoProgress())
        try:
            audit.run(chosen)
        except BaseException as error:
            if not isinstance(error, Exception) and (out / ROWS).is_file():  # Ctrl-C or SIGTERM
                error.add_note(f"finished runs are kept in {out}: run the same command again to resume")
            raise
        summary = finite(summarise(bench, list(audit.rows.used.values()), chosen, audit.sweeps))
        write_json(out / SUMMARY, summary)
    return summary


def _of_suite(config: AuditConfig) -> list[type[Attack]]:
    return [attack for attack in registry().values() if attack.in_quick or config.suite != "quick"]


class Audit:
    """Runs the attacks of one audit in order and keeps their rows.

    Raises:
        UsageError: fine-tuning does not improve the original on a task, so there is no target.
    """

    def __init__(self, bench: Bench, out: Path, controls: list[Path], progress: Progress):
        self.bench, self.config, self.out, self.progress = bench, bench.config, out, progress
        self.rows = RowStore(out, controls)
        self.targets: dict[str, Target] = {}
        self.sweeps: list[dict] = []

    def run(self, chosen: list[type[Attack]]) -> None:
        """Run the attacks, in the order of steps 2 to 6 at the top of this file."""
        first, *others = self.bench.tasks
        for task in self.bench.tasks:
            self._reference(task)
        for attack in chosen:
            self._attack(attack, first)
        if self.config.sweep:
            self._sweep([a for a in chosen if issubclass(a, GradientAttack)], first)
        self._unlocked_with_winners(first)
        for task in others:
            if self.config.exhaustive:
                for attack in chosen:
                    self._attack(attack, task)
            else:
                self._attack_with_winners(first, task)
            self._unlocked_with_winners(task)
        for task in self.bench.tasks:
            self._repeat(task)

    def _reference(self, task: str) -> None:
        """Fine-tune the original with the baseline and set the target of the task."""
        baseline = gradient_attack(BASELINE)
        rows = [self._gradient(baseline, config, task, "original") for config in baseline.trials(self.config)]
        target = reference_target(rows, self.config.target_share)
        if target is None:
            reasons = "; ".join(dict.fromkeys(row["note"] or row["status"] for row in rows))
            raise UsageError(
                f"fine-tuning does not improve the original on {task} ({reasons}): "
                "change --learning-rate, --steps or --batch-rows"
            )
        self.targets[task] = target
        self.progress.say(f"{task}: held-out loss of the original {target.start:.3f}, target {target.loss:.3f}")

    def _attack(self, attack: type[Attack], task: str) -> None:
        """Run the suite's trials of one attack on one task, first on the original, then on the lock."""
        if issubclass(attack, Probe):
            for config in attack.trials(self.config):
                self._row(attack, config, None, "locked", functools.partial(attack(config).probe, self.bench))
        elif issubclass(attack, UnlockAttack):
            for config in attack.trials(self.config):
                self._unlock(attack, config, task)
        elif issubclass(attack, GradientAttack):
            for subject in SUBJECTS:
                for config in self._gradient_trials(attack, task, subject):
                    self._gradient(attack, config, task, subject)

    def _gradient_trials(self, attack: type[GradientAttack], task: str, subject: Subject) -> Iterator[FinetuneConfig]:
        """Yield the settings of an attack. Later ones depend on the results of earlier ones."""
        grid = groups(attack.trials(self.config))
        if self.config.exhaustive:
            yield from (config for group in grid for config in group)
            return
        position = self._baseline_position(task, subject)
        for number, group in enumerate(grid):
            if takes_baseline_steps(group[0]):
                yield group[min(position, len(group) - 1)]
            elif number:
                yield group[min(best_position(self._rows_of(attack, grid[0], task, subject)), len(group) - 1)]
            else:
                yield from group

    def _rows_of(
        self, attack: type[GradientAttack], configs: Sequence[FinetuneConfig], task: str, subject: Subject
    ) -> list[dict]:
        return [self._gradient(attack, config, task, subject) for config in configs]

    def _baseline_position(self, task: str, subject: Subject) -> int:
        """Index of the learning rate that was best for the baseline; on the original if it did not run on `subject`."""
        baseline = gradient_attack(BASELINE)
        known = {row["model"] for row in self.rows.used.values() if row["attack"] == BASELINE and row["task"] == task}
        on: Subject = subject if subject in known else "original"
        return best_position(self._rows_of(baseline, baseline.trials(self.config), task, on))

    def _unlock(self, attack: type[UnlockAttack], config: BaseModel, task: str) -> None:
        """Run the control, the unlock, and the baseline on the unlocked model, at the best rate of the original."""
        found = self._row(attack, config, None, "original", lambda: control(attack, config, self.bench))
        if found["status"] != "finished":
            return
        settings = gradient_attack(BASELINE).trials(self.config)
        if not self.config.exhaustive:
            settings = [settings[self._baseline_position(task, "original")]]
        for finetuning in settings:
            self._unlocked(attack, config, finetuning, task)

    def _unlocked_with_winners(self, task: str) -> None:
        """Fine-tune the models of the cheapest unlocks with the attacks that were cheapest on the original."""
        rows = list(self.rows.used.values())
        for unlock_row, row in unlocks_and_finetunes(rows, task, self.targets[task], self.config.seed):
            finetuning = gradient_attack(row["attack"]).Config(**row["config"])
            attack, config = _unlock_of(unlock_row)
            self._unlocked(attack, config, finetuning, task, row["attack"])

    def _unlocked(
        self,
        attack: type[UnlockAttack],
        config: BaseModel,
        finetuning: FinetuneConfig,
        task: str,
        finetune_attack: str = BASELINE,
    ) -> dict:
        """The row of an unlock followed by a fine-tune of the unlocked model."""

        def work() -> dict:
            unlocked, record = unlock(attack, config, self.bench, self.out)
            model = unlocked.model.requires_grad_(True)
            result = gradient_attack(finetune_attack)(finetuning).run(model, self.bench, self.bench.tasks[task])
            return run_record(result, unlocked.cost) | {"unlock": record}

        both: dict[str, Any] = {"unlock": config.model_dump(), "finetune": finetuning.model_dump()}
        if finetune_attack != BASELINE:
            both["finetune_attack"] = finetune_attack
        return self._row(attack, both, task, "locked", work)

    def _gradient(self, attack: type[GradientAttack], config: FinetuneConfig, task: str, subject: Subject) -> dict:
        """The row of a fine-tune of the original or the lock."""

        def work() -> dict:
            return run_record(attack(config).run(self.bench.load(subject), self.bench, self.bench.tasks[task]))

        return self._row(attack, config, task, subject, work)

    def _sweep(self, attacks: list[type[GradientAttack]], task: str) -> None:
        """Search over the settings of attacks, with the same number of trials on the original and on the lock."""
        for attack in attacks:
            if takes_baseline_steps(attack.trials(self.config)[0]):
                continue
            for subject in SUBJECTS:
                sweep = Sweep(self.out, attack, task, subject, self.bench, self.targets[task])
                self.sweeps.append(sweep.run(functools.partial(self._gradient, attack, task=task, subject=subject)))

    def _attack_with_winners(self, first: str, task: str) -> None:
        """Run the baseline and the cheapest attacks of the first task on another task."""
        self._attack(attack_class(BASELINE), task)
        for row in self._winners(first):
            if "unlock" in row["config"]:
                self._unlock(*_unlock_of(row), task)
                continue
            attack = gradient_attack(row["attack"])
            config = attack.Config(**row["config"])
            same = [g for g in groups(attack.trials(self.config)) if without_rate(g[0]) == without_rate(config)]
            for subject in SUBJECTS:
                self._rows_of(attack, same[0] if same else [config], task, subject)

    def _winners(self, task: str) -> list[dict]:
        return winners(list(self.rows.used.values()), task, self.targets[task], self.config.seed)

    def _repeat(self, task: str) -> None:
        """Repeat the cheapest attacks on a task, and the baseline, with more seeds."""
        for row in self._winners(task):
            for seed in range(self.config.seed + 1, self.config.seed + self.config.seeds):
                if "unlock" in row["config"]:
                    name = row["config"].get("finetune_attack", BASELINE)
                    finetuning = gradient_attack(name).Config(**row["config"]["finetune"] | {"seed": seed})
                    self._unlocked(*_unlock_of(row), finetuning, task, name)
                else:
                    attack = gradient_attack(row["attack"])
                    self._gradient(attack, attack.Config(**row["config"] | {"seed": seed}), task, row["model"])

    def _row(
        self,
        attack: type[Attack],
        config: BaseModel | dict,
        task: str | None,
        subject: Subject,
        work: Callable[[], dict],
    ) -> dict:
        """The row of a run, computed by `work` unless it is there already. Progress is reported only if it runs."""
        settings = config if isinstance(config, dict) else config.model_dump()
        ran = False

        def reported() -> dict:
            nonlocal ran
            ran = True
            name = run_name({"attack": attack.name, "config": settings})
            self.progress.start(f"{name} on the {subject}" + (f", {task}" if task else ""), 1)
            return work()

        row = self.rows.row(
            head_of(attack, settings, task, subject), depends_on(self.bench, attack, settings, task, subject), reported
        )
        if ran:
            self.progress.finish(row["note"] or _short(row))
        return row


def _unlock_of(row: dict) -> tuple[type[UnlockAttack], BaseModel]:
    """The unlock of a row, and its settings."""
    attack = attack_class(row["attack"])
    assert issubclass(attack, UnlockAttack), f"{attack.name} is not an unlock"
    return attack, attack.Config(**row["config"]["unlock"])


def _short(row: dict) -> str:
    """One line of progress on a finished run."""
    if "best_loss" in row:
        return f"held-out loss {row['start_loss']:.3f} -> {row['best_loss']:.3f}"
    if "won_back" not in row:
        return ""
    won_back = row["won_back"]
    return f"control recovers {NOT_FINITE if won_back is None else format(won_back, '.1%')}"


def run_record(result: FinetuneResult, before: Cost | None = None) -> dict:
    """The figures of a fine-tuning run, for its row.

    Args:
        before: cost of an unlock that came before. It is added to every point of the curve and to the total.
    """
    before = before or Cost()
    work = ("tokens", "flops", "seconds")
    curve = [
        point.record() | {key: getattr(point, key) + getattr(before, key) for key in work} for point in result.curve
    ]
    return {
        "start_loss": result.start,
        "best_loss": result.best,
        "mean_loss_over_log_budget": result.mean_over_log_budget(),
        "diverged": result.diverged,
        "curve": curve,
        "cost": (result.cost + before).record(),
        "finetune_cost": result.cost.record(),
        "notes": result.notes,
    }
