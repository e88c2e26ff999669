"""A search over the settings of an attack: one Optuna study for each attack, task and model, all in one file.

1. The trials of a study are numbered, and those with a number below the budget count. So original and lock get the
   same number of trials, however many processes share the file.
2. The process that runs a trial holds a file lock on it. If the process dies, the lock is released, and another process
   runs the trial with the same settings. No trial is lost or counted twice.
3. The value to minimise is the share of the budget that was spent when the target was reached. If it was not
   reached, the value is 1 plus the difference between the lowest loss and the target.

Settings come from Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), seeded by the trial's number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lockkit.attack.rows import depends_on, key_of
from lockkit.attack.target import Target, cost_to_target
from lockkit.errors import UsageError

if TYPE_CHECKING:
    import optuna

    from lockkit.attack.base import GradientAttack
    from lockkit.attack.finetune import FinetuneConfig
    from lockkit.attack.subjects import Subject, Subjects

FILE, LOCKS = "sweep.log", ".sweep-locks"
POLL_SECONDS = 0.2


class Sweep:
    """The search over the settings of one attack on one task and model.

    Raises:
        UsageError: optuna is not installed.
    """

    def __init__(
        self, out: Path, attack: type[GradientAttack], task: str, subject: Subject, subjects: Subjects, target: Target
    ):
        self.attack, self.task, self.subject, self.target = attack, task, subject, target
        self.config, self.budget = subjects.config, subjects.config.sweep
        # The budget is not part of the key, so that a longer search continues a shorter one.
        settings = self.config.model_dump(include={"steps", "batch_rows", "seed", "target_share"})
        key = key_of(depends_on(subjects, attack, settings, task, subject))[:12]
        self.name = f"{attack.name} {task} {subject} {key}"
        self.locks = out / LOCKS
        self.locks.mkdir(exist_ok=True)
        self.study = _study(out / FILE, self.name)

    def run(self, row_of: Callable[[FinetuneConfig], dict]) -> dict:
        """Run trials until this process and others have spent the budget.

        Args:
            row_of: runs a trial with these settings and returns its row.

        Returns:
            The record of the search: attack, task, model, budget, and each trial's number, settings, value and loss.
        """
        while (found := self._next()) is not None:
            trial, lock = found
            try:
                self._trial(trial, row_of)
            finally:
                lock.release()
        # Read from the study, so that trials of other processes are included.
        trials = [self._record(trial, row_of) for trial in self.study.get_trials() if trial.number < self.budget]
        return {
            "attack": self.attack.name,
            "task": self.task,
            "model": self.subject,
            "budget": self.budget,
            "trials": trials,
        }

    def _next(self) -> tuple[optuna.Trial, FileLock] | None:
        """The next trial to run, and the lock that is held on it. None when all trials are finished.

        Waits while other processes run the last trials.
        """
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
                with self._lock("next"):  # so that no other process sees the trial before its lock is held
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

    def _suggested(self, trial: optuna.Trial) -> FinetuneConfig:
        from optuna.samplers import TPESampler

        self.study.sampler = TPESampler(seed=self.config.seed + trial.number)
        return self.attack.suggest(trial, self.config)

    def _trial(self, trial: optuna.Trial, row_of: Callable[[FinetuneConfig], dict]) -> None:
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
        tokens = cost["tokens"]
        assert tokens is not None, "the tokens of a run are always counted"
        return tokens / (self.config.steps * self.config.batch_rows * self.config.block_tokens)

    def _record(self, trial: optuna.trial.FrozenTrial, row_of: Callable[[FinetuneConfig], dict]) -> dict:
        from optuna.trial import FixedTrial, TrialState

        if trial.state == TrialState.COMPLETE:
            row_of(
                self.attack.suggest(FixedTrial(trial.params), self.config)
            )  # its row exists, and is now one of this audit's
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
