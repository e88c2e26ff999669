"""The runs of an audit, in order.

1. References: fine-tune the original with the baseline; its learning rate is searched (rates.py). The best of these runs
   sets the target loss of a task.
2. Run every attack on the first task, on the original (positive control) and on the lock, at the settings that
   selection.py chooses. Attacks that need chains are left out if LOCKED has none. Each unlock first runs on the original
   rewritten as a chain (positive control), then on the lock (unlocking.py). The unlocked model is fine-tuned with the
   baseline. The models of the cheapest unlocks are also fine-tuned with the attacks that were cheapest on the original.
   The cost of the unlock is added to each.
3. With `sweep`, search over the settings of each gradient attack on that task, with the same number of trials on
   both models (sweep.py).
4. Run the cheapest attacks of the first task on the other tasks.
5. Repeat the cheapest attacks, in any resource, with more seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lockkit.attack.base import Attack, GradientAttack, Probe, UnlockAttack
from lockkit.attack.config import AuditConfig
from lockkit.attack.cost import Cost
from lockkit.attack.finetune import FinetuneConfig, FinetuneResult
from lockkit.attack.rates import RATES, RateSearch, nearest, starting_rate
from lockkit.attack.registry import attack_class, gradient_attack
from lockkit.attack.rows import AGAIN, RowStore, depends_on, head_of
from lockkit.attack.selection import BASELINE, takes_baseline_steps, unlocks_and_finetunes, winners, without_rate
from lockkit.attack.subjects import SUBJECTS, Subject, Subjects
from lockkit.attack.sweep import Sweep
from lockkit.attack.target import NOT_FINITE, Target, cost_to_target, first_step_at, reference_target, run_name
from lockkit.attack.unlocking import control, unlock
from lockkit.errors import UsageError
from lockkit.progress import Progress


class Audit:
    """Runs the attacks of one audit in order and keeps their rows.

    Attributes:
        rows: the rows.
        targets: the target of each task.
        sweeps: the records of searches.

    Raises:
        UsageError: fine-tuning does not improve the original on a task, so there is no target.
    """

    def __init__(self, subjects: Subjects, out: Path, controls: list[Path], progress: Progress):
        self.subjects, self.config, self.out, self.progress = subjects, subjects.config, out, progress
        self.rows = RowStore(out, controls)
        self.targets: dict[str, Target] = {}
        self.sweeps: list[dict] = []
        self._references: dict[str, dict[float, dict]] = {}  # rows by task and learning rate
        self._reference_rates: dict[str, float] = {}  # by task
        self._best_rates: dict[tuple[str, str, Subject], float] = {}  # by attack, task and model

    def run(self, chosen: list[type[Attack]]) -> None:
        """Run the attacks, in the order of the steps at the top of this file."""
        first, *others = self.subjects.tasks
        for task in self.subjects.tasks:
            self._reference(task)
        for attack in chosen:
            self._attack(attack, first)
        if self.config.sweep:
            self._sweep([a for a in chosen if issubclass(a, GradientAttack) and not a.off_the_shelf], first)
        self._unlocked_with_winners(first)
        for task in others:
            if self.config.exhaustive:
                for attack in chosen:
                    self._attack(attack, task)
            else:
                self._attack_with_winners(first, task)
            self._unlocked_with_winners(task)
        for task in self.subjects.tasks:
            self._repeat(task)

    def one(self, attack: type[Attack], settings: dict[str, Any], task: str) -> dict:
        """The row of one run on the lock, with these settings."""
        if issubclass(attack, UnlockAttack):
            name = settings.get("finetune_attack", BASELINE)
            finetuning = gradient_attack(name).Config(**settings["finetune"])
            return self._unlocked(attack, attack.Config(**settings["unlock"]), finetuning, task, name)
        assert issubclass(attack, GradientAttack), "recipes are of fine-tuning runs"
        return self._gradient(attack, attack.Config(**settings), task, "locked")

    def _reference(self, task: str) -> None:
        """Fine-tune the original with the baseline and set the target of the task."""
        search = RateSearch(starting_rate(self.subjects.parameters("original")))
        rows = self._search_on(gradient_attack(BASELINE), {}, task, "original", search)
        target = reference_target(rows, self.config.target_share, self.config.target_loss)
        if target is None:
            raise UsageError(_no_target(task, rows, self.config))
        self.targets[task], self._reference_rates[task] = target, search.best
        self._references[task] = {row["config"]["learning_rate"]: row for row in rows}
        self.progress.say(f"{task}: held-out loss of the original {target.start:.3f}, target {target.loss:.3f}")

    def _attack(self, attack: type[Attack], task: str) -> None:
        """Run the suite's trials of one attack on one task, first on the original, then on the lock."""
        if issubclass(attack, Probe):
            for config in attack.trials(self.config):
                self._row(attack, config, None, "locked", functools.partial(attack(config).probe, self.subjects))
        elif issubclass(attack, UnlockAttack):
            for config in attack.trials(self.config):
                self._unlock(attack, config, task)
        elif issubclass(attack, GradientAttack):
            for number, variant in enumerate(attack.suite_variants(self.config)):
                self._variant(attack, variant, task, number)

    def _variant(self, attack: type[GradientAttack], variant: dict[str, Any], task: str, number: int = 0) -> None:
        """Fine-tune both models with a variant of an attack: at a known learning rate, or at those of a search."""
        rates = {subject: self._known_rate(attack, variant, task, number, subject) for subject in SUBJECTS}
        if any(rate is None for rate in rates.values()):
            self._search(attack, variant, task)
            return
        for subject, rate in rates.items():
            assert rate is not None, "checked above"
            self._gradient(attack, self._settings(attack, variant, rate, task), task, subject)

    def _known_rate(
        self, attack: type[GradientAttack], variant: dict[str, Any], task: str, number: int, subject: Subject
    ) -> float | None:
        """The learning rate of a variant, if the best rate of another is used for it (selection.py)."""
        if self.config.exhaustive:
            return None
        source = attack.rate_source(self.config) or (attack.name if number else None)
        if takes_baseline_steps(attack.configured(self.config, variant, RATES[0])):
            source = BASELINE
        if source is None:
            return None
        found = self._best_rates.get((source, task, subject))
        return self._reference_rates[task] if found is None and source == BASELINE else found

    def _search(self, attack: type[GradientAttack], variant: dict[str, Any], task: str) -> None:
        """Search the learning rate on both models, with equal trials (rates.py)."""
        searches: dict[Subject, RateSearch] = {}
        for subject in SUBJECTS:
            known = [self._best_rates.get((name, task, "original")) for name in (attack.name, BASELINE)]
            start = next((rate for rate in known if rate is not None), self._reference_rates[task])
            searches[subject] = RateSearch(nearest(start))
            self._search_on(attack, variant, task, subject, searches[subject])
            self._best_rates.setdefault((attack.name, task, subject), searches[subject].best)
        most = max(len(search.tried) for search in searches.values())
        for subject, search in searches.items():
            while not self.config.learning_rates and len(search.tried) < most and math.isfinite(search.value):
                rate = search.another()
                if rate is None:
                    break
                self._trial(attack, variant, task, subject, search, rate)

    def _search_on(
        self, attack: type[GradientAttack], variant: dict[str, Any], task: str, subject: Subject, search: RateSearch
    ) -> list[dict]:
        """Run the trials of a search, or those at the rates that were given."""
        rows = []
        if self.config.learning_rates:
            rows = [self._trial(attack, variant, task, subject, search, rate) for rate in self.config.learning_rates]
        else:
            while (rate := search.next()) is not None:
                rows.append(self._trial(attack, variant, task, subject, search, rate))
                if rows[-1]["status"] in AGAIN:  # it would be the same at another rate
                    break
        return rows

    def _trial(
        self,
        attack: type[GradientAttack],
        variant: dict[str, Any],
        task: str,
        subject: Subject,
        search: RateSearch,
        rate: float,
    ) -> dict:
        """One trial of a search. It ends when it can no longer be the best, if runs end at the target."""
        reference = attack.name == BASELINE and subject == "original"
        row = self._references.get(task, {}).get(rate) if reference else None  # it is this run, to its end
        if row is None:
            row = self._gradient(attack, self._settings(attack, variant, rate, task, search.limit), task, subject)
        target = self.targets.get(task)
        search.tried[rate] = trial_value(row, target)
        step = first_step_at(row, target.loss) if target else None
        if step is not None:
            search.limit = max(1, min(step, search.limit or step))
        return row

    def _settings(
        self,
        attack: type[GradientAttack],
        variant: dict[str, Any],
        rate: float,
        task: str,
        most_steps: int | None = None,
    ) -> FinetuneConfig:
        """The settings of a run, with its limits."""
        config = attack.configured(self.config, variant, rate)
        return config.model_copy(update=self._limits(task, most_steps)) if task in self.targets else config

    def _limits(self, task: str, most_steps: int | None = None) -> dict[str, Any]:
        """When a run ends."""
        if not self.config.stop_at_target:
            return {"stop_loss": None, "most_steps": None}
        return {"stop_loss": self.targets[task].loss, "most_steps": most_steps}

    def _unlock(self, attack: type[UnlockAttack], config: BaseModel, task: str) -> None:
        """Run the control, the unlock, and the baseline on the unlocked model, at the best rate of the original."""
        found = self._row(attack, config, None, "original", lambda: control(attack, config, self.subjects))
        if found["status"] != "finished":
            return
        best = self._best_rates.get((BASELINE, task, "original"), self._reference_rates[task])
        for rate in self.config.learning_rates if self.config.exhaustive and self.config.learning_rates else [best]:
            self._unlocked(attack, config, self._settings(gradient_attack(BASELINE), {}, rate, task), task)

    def _unlocked_with_winners(self, task: str) -> None:
        """Fine-tune the models of the cheapest unlocks with the attacks that were cheapest on the original."""
        rows = list(self.rows.used.values())
        found = unlocks_and_finetunes(
            rows, task, self.targets[task], self.config.seed, one_unlock=self.config.suite == "quick"
        )
        for unlock_row, row in found:
            finetuning = gradient_attack(row["attack"]).Config(**row["config"] | self._limits(task))
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
            unlocked, record = unlock(attack, config, self.subjects, self.out)
            model = unlocked.model.requires_grad_(True)
            result = gradient_attack(finetune_attack)(finetuning).run(model, self.subjects, self.subjects.tasks[task])
            return run_record(result, unlocked.cost) | {"unlock": record}

        both: dict[str, Any] = {"unlock": config.model_dump(), "finetune": finetuning.model_dump()}
        if finetune_attack != BASELINE:
            both["finetune_attack"] = finetune_attack
        return self._row(attack, both, task, "locked", work)

    def _gradient(self, attack: type[GradientAttack], config: FinetuneConfig, task: str, subject: Subject) -> dict:
        """The row of a fine-tune of the original or the lock."""

        def work() -> dict:
            return run_record(attack(config).run(self.subjects.load(subject), self.subjects, self.subjects.tasks[task]))

        return self._row(attack, config, task, subject, work)

    def _sweep(self, attacks: list[type[GradientAttack]], task: str) -> None:
        """Search over the settings of attacks, with the same number of trials on the original and on the lock."""
        for attack in attacks:
            if takes_baseline_steps(attack.configured(self.config, attack.variants()[0], RATES[0])):
                continue
            for subject in SUBJECTS:
                sweep = Sweep(self.out, attack, task, subject, self.subjects, self.targets[task])
                self.sweeps.append(sweep.run(functools.partial(self._gradient, attack, task=task, subject=subject)))

    def _attack_with_winners(self, first: str, task: str) -> None:
        """Run the baseline and the cheapest attacks of the first task on another task."""
        self._variant(gradient_attack(BASELINE), {}, task)
        for row in self._winners(first):
            if "unlock" in row["config"]:
                self._unlock(*_unlock_of(row), task)
                continue
            attack = gradient_attack(row["attack"])
            config = attack.Config(**row["config"])
            variants = [v for v in attack.variants() if self._is_of(attack, v, config)]
            for variant in variants:
                self._variant(attack, variant, task)
            if not variants:  # it comes from a sweep
                for subject in SUBJECTS:
                    self._gradient(attack, config.model_copy(update=self._limits(task)), task, subject)

    def _is_of(self, attack: type[GradientAttack], variant: dict[str, Any], config: FinetuneConfig) -> bool:
        """Whether these are settings of a variant."""
        return without_rate(attack.configured(self.config, variant, RATES[0])) == without_rate(config)

    def _winners(self, task: str) -> list[dict]:
        return winners(list(self.rows.used.values()), task, self.targets[task], self.config.seed)

    def _repeat(self, task: str) -> None:
        """Repeat the cheapest attacks on a task, and the baseline, with more seeds."""
        for row in self._winners(task):
            for seed in range(self.config.seed + 1, self.config.seed + self.config.seeds):
                other = {"seed": seed} | self._limits(task)
                if "unlock" in row["config"]:
                    name = row["config"].get("finetune_attack", BASELINE)
                    finetuning = gradient_attack(name).Config(**row["config"]["finetune"] | other)
                    self._unlocked(*_unlock_of(row), finetuning, task, name)
                else:
                    attack = gradient_attack(row["attack"])
                    self._gradient(attack, attack.Config(**row["config"] | other), task, row["model"])

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
            head_of(attack, settings, task, subject),
            depends_on(self.subjects, attack, settings, task, subject),
            reported,
        )
        if ran:
            self.progress.finish(row["note"] or _short(row))
        return row


def _no_target(task: str, rows: list[dict], config: AuditConfig) -> str:
    """Why there is no target, and what to change."""
    finished = [row for row in rows if row["status"] == "finished"]
    if finished and config.target_loss is not None:
        best = min(row["best_loss"] for row in finished)
        return f"the original reaches {best:.3f} on {task}, not {config.target_loss}: raise --target-loss or --steps"
    reasons = "; ".join(dict.fromkeys(row["note"] or row["status"] for row in rows))
    rates = ", ".join(f"{row['config']['learning_rate']:g}" for row in rows)
    return (
        f"fine-tuning does not improve the original on {task} at learning rates {rates} ({reasons}): "
        "change --steps, --batch-rows or --learning-rate"
    )


def trial_value(row: dict, target: Target | None) -> float:
    """How good a trial of a search for learning rates was; lower is better, infinity if it failed (rates.py)."""
    if not row.get("curve"):
        return math.inf
    if target is None:
        return row["best_loss"]
    cost = cost_to_target(row, target.loss)
    if cost is None or cost["step"] is None:
        return 1 + row["best_loss"] - target.loss
    return cost["step"] / row["config"]["steps"]


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
        "trained_parameters": result.trained_parameters,
        "step_seconds": result.step_seconds,
        "general_loss": result.general_loss,
        "cost": (result.cost + before).record(),
        "finetune_cost": result.cost.record(),
        "notes": result.notes,
    }
