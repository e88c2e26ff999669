"""A search over an attack's settings: one Optuna study for each attack, task and model, in one file.

1. A study's trials are numbered, and those below the budget count. So original and lock get the same number,
   whatever the number of processes that share the file.
2. The process that runs a trial holds a file lock on it. If it dies, the lock is free, and another process
   takes the trial over with the same settings: no trial is lost or counted twice.
3. The value is the share of the budget spent when the target was reached; if it was not, one plus
   how far the loss stayed above it.

Settings come from Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), seeded by the trial's number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from pydantic import BaseModel

from lockkit.attack.rows import depends_on, key_of
from lockkit.attack.target import Target, cost_to_target
from lockkit.errors import UsageError

if TYPE_CHECKING:
    import optuna

    from lockkit.attack.base import GradientAttack
    from lockkit.attack.bench import Bench

FILE, LOCKS = "sweep.log", ".sweep-locks"
POLL_SECONDS = 0.2


class Sweep:
    """The search over one attack on one task and model.

    Raises:
        UsageError: optuna is not installed.
    """

    def __init__(self, out: Path, attack: type[GradientAttack], task: str, subject: str, bench: Bench, target: Target):
        self.attack, self.task, self.subject, self.target = attack, task, subject, target
        self.config, self.budget = bench.config, bench.config.sweep
        # Not the budget: a longer sweep resumes a shorter one.
        settings = self.config.model_dump(include={"steps", "batch_rows", "seed", "target_share"})
        key = key_of(depends_on(bench, attack, settings, task, subject))[:12]
        self.name = f"{attack.name} {task} {subject} {key}"
        self.locks = out / LOCKS
        self.locks.mkdir(exist_ok=True)
        self.study = _study(out / FILE, self.name)

    def run(self, row_of: Callable[[BaseModel], dict]) -> dict:
        """Run trials until the budget is spent, by this process or others; every trial is a row.

        Returns:
            The record: attack, task, model, budget, and each trial's number, settings, value and loss.
        """
        while (found := self._next()) is not None:
            trial, lock = found
            try:
                self._trial(trial, row_of)
            finally:
                lock.release()
        # Settings come back from the study in the order of trials: also rows that other processes made.
        trials = [self._record(trial, row_of) for trial in self.study.get_trials() if trial.number < self.budget]
        return {
            "attack": self.attack.name,
            "task": self.task,
            "model": self.subject,
            "budget": self.budget,
            "trials": trials,
        }

    def _next(self) -> tuple[optuna.Trial, FileLock] | None:
        """A trial to run, locked; waits while others run the last ones. None when all are done."""
        import optuna

        while True:
            trials = self.study.get_trials(deepcopy=False)
            open_ = [t for t in trials if t.number < self.budget and not t.state.is_finished()]
            for trial in open_:
                lock = self._lock(trial.number)
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    continue
                current = self.study.get_trials(deepcopy=False)[trial.number]
                if not current.state.is_finished():  # its process died
                    return optuna.trial.Trial(self.study, current._trial_id), lock
                lock.release()
            if len(trials) < self.budget:
                with self._lock("next"):  # a trial and its lock are taken together
                    number = len(self.study.get_trials(deepcopy=False))
                    if number < self.budget:
                        lock = self._lock(number)
                        lock.acquire()
                        return self.study.ask(), lock
            elif not open_:
                return None
            time.sleep(POLL_SECONDS)

    def _lock(self, what: int | str) -> FileLock:
        return FileLock(self.locks / f"{key_of([self.name])[:16]}-{what}.lock")

    def _suggested(self, trial: optuna.Trial) -> BaseModel:
        from optuna.samplers import TPESampler

        self.study.sampler = TPESampler(seed=self.config.seed + trial.number)
        return self.attack.suggest(trial, self.config)

    def _trial(self, trial: optuna.Trial, row_of: Callable[[BaseModel], dict]) -> None:
        from optuna.trial import TrialState

        row = row_of(self._suggested(trial))
        value = self._value(row)
        if value is None:
            trial.set_user_attr("note", row["note"] or row["status"])
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("loss", row["best_loss"])
            self.study.tell(trial, value)

    def _value(self, row: dict) -> float | None:
        if not row.get("curve"):
            return None
        cost = cost_to_target(row, self.target.loss)
        if cost is None:
            return 1 + row["best_loss"] - self.target.loss
        return cost["step"] / self.config.steps

    def _record(self, trial: optuna.trial.FrozenTrial, row_of: Callable[[BaseModel], dict]) -> dict:
        from optuna.trial import FixedTrial, TrialState

        if trial.state == TrialState.COMPLETE:
            row_of(self.attack.suggest(FixedTrial(trial.params), self.config))  # the row exists and is read
        return {
            "number": trial.number,
            "settings": trial.params,
            "value": trial.value,
            "loss": trial.user_attrs.get("loss"),
            "note": trial.user_attrs.get("note", ""),
        }


def _study(file: Path, name: str) -> optuna.Study:
    try:
        import optuna
    except ImportError as error:
        raise UsageError("sweeps need optuna, which is not installed: pip install 'lockkit[attack]'") from error
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(file)))
    return optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
