"""The audit: from two model folders to rows and a summary.

1. Load the models, tasks and text, and check that they match (subjects.py).
2. Run the attacks (audit.py). Each run is a row (rows.py), written as soon as it ends. An interrupted audit resumes after
   its last row.
3. Write `summary.json`: verdict, targets, headline, figures of the lock, what was not tried (summary.py); and
   `recipe.json`, which runs the cheapest attack on the lock again (recipe.py).
"""

from __future__ import annotations

from pathlib import Path

from lockkit.attack.audit import Audit
from lockkit.attack.base import Attack, Probe
from lockkit.attack.config import AuditConfig, audit_config
from lockkit.attack.recipe import FILE as RECIPE
from lockkit.attack.recipe import Recipe, best_recipe
from lockkit.attack.registry import attack_class, registry
from lockkit.attack.rows import ROWS, check_controls, finite
from lockkit.attack.selection import BASELINE
from lockkit.attack.subjects import Subjects
from lockkit.attack.summary import summarise
from lockkit.attack.verdict import lacking
from lockkit.errors import UsageError
from lockkit.files import complete_lines, readable_disk_errors, write_json
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
        locked: the lock, or another model that is to be costly to fine-tune: a folder or a Hub id.
        original: the model it was made from: a folder, a Hub id or `demo`.
        out: folder of the audit. If it holds an interrupted audit, that is resumed.
        attacks: names of attacks; by default those of the suite.
        controls: folders of other audits, whose rows of the original are reused where they fit.

    Returns:
        The summary. Figures that are not finite are None in it.

    Raises:
        UsageError: models, tasks, attacks, `controls` or `out` cannot be used as given.
    """
    chosen = [attack_class(name) for name in attacks] if attacks else of_suite(config)
    chosen.sort(key=lambda attack: attack.name != BASELINE)  # first, because others depend on its best learning rate
    check_controls(controls or [])
    check_results_folder(out, "--out")
    if out.exists() and content(out) and not (out / ROWS).is_file():
        raise UsageError(f"{out} exists and is not an audit that can be resumed: change --out")
    subjects = Subjects(locked, original, config)
    left_out = [attack.name for attack in chosen if attack.needs_chains and not subjects.has_chains]
    chosen = [attack for attack in chosen if attack.name not in left_out]
    if not chosen:
        raise UsageError(f"{locked} is no lock of lockkit, and {', '.join(left_out)} need one: change --attack")
    with readable_disk_errors(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        progress = progress or NoProgress()
        if missing := _missing(chosen, subjects):
            progress.say(f"these attacks cannot give a verdict: {'; '.join(missing)} is missing (--attack adds one)")
        audit = Audit(subjects, out, controls or [], progress)
        try:
            audit.run(chosen)
        except BaseException as error:
            if not isinstance(error, Exception) and (out / ROWS).is_file():  # Ctrl-C or SIGTERM
                error.add_note(f"finished runs are kept in {out}: run the same command again to resume")
            raise
        rows = list(audit.rows.used.values())
        summary = finite(summarise(subjects, rows, chosen, left_out, audit.targets, audit.sweeps))
        summary["rows_written"] = len(complete_lines(out / ROWS))
        write_json(out / SUMMARY, summary)
        recipe = best_recipe(subjects, rows, audit.targets)
        if recipe is not None:
            write_json(out / RECIPE, recipe.record())
    return summary


def _missing(chosen: list[type[Attack]], subjects: Subjects) -> list[str]:
    """What the verdict will lack, whatever the runs find. On further tasks the baseline always runs (audit.py)."""
    others = [attack for attack in chosen if attack.name != BASELINE and attack.family != "control"]
    informed = {a.name: a.lock_aware for a in others if not a.off_the_shelf and not issubclass(a, Probe)}
    has_baseline = BASELINE in [attack.name for attack in chosen]
    has_baseline |= len(subjects.tasks) > 1 and not subjects.config.exhaustive
    return lacking(informed, has_baseline, subjects.has_chains)


def rerun(
    recipe: Recipe, locked: str, original: str, out: Path, progress: Progress | None = None, device: str = "auto"
) -> dict:
    """Run the one attack of a recipe on a lock.

    Args:
        locked, original: as for `run_audit`. The original gives the tokenizer and the shape; it is not fine-tuned.
        out: folder for its row.

    Returns:
        The row.

    Raises:
        UsageError: the models, the recipe's attack or `out` cannot be used as given.
    """
    check_results_folder(out, "--out")
    config = audit_config(**recipe.config | {"tasks": [recipe.task], "device": device, "sweep": 0})
    attack = attack_class(recipe.attack)
    subjects = Subjects(locked, original, config)
    if attack.needs_chains and not subjects.has_chains:
        raise UsageError(f"{locked} is no lock of lockkit, and {attack.name} needs one: change --recipe")
    with readable_disk_errors(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        audit = Audit(subjects, out, [], progress or NoProgress())
        audit.targets[recipe.task] = recipe.target
        return audit.one(attack, recipe.settings, recipe.task)


def of_suite(config: AuditConfig) -> list[type[Attack]]:
    """The attacks of a suite."""
    return [attack for attack in registry().values() if attack.in_quick or config.suite != "quick"]
