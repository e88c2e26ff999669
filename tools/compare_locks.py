"""Locks of one model compared in one table: depths, starts and couplings.

    python tools/compare_locks.py --out tools/results/locks --work /somewhere/with/space

1. Lock the model at every depth, start and coupling. Locks that exist in --work are not made again.
2. Audit each lock. Rows of the original are computed once and shared (`lockkit attack --controls`).
3. Write OUT.json and OUT.md: quality, effective depth, unlock ratio, owner's advantage, and the
   amplification of each resource with the cheapest attack, its mean and spread over seeds.

Locks and audits stay in --work, so the same command resumes an interrupted run.
`--quick` tests the tool itself, with locks of a few thousand tokens and the suite `quick`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from lockkit.attack.config import audit_config
from lockkit.attack.run import run_audit
from lockkit.attack.sentences import times
from lockkit.attack.target import RESOURCE_TITLES as RESOURCES
from lockkit.cli.console import TerminalProgress
from lockkit.errors import DistillationError
from lockkit.files import write_json
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.measure.records import MeasuredText
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-locks-compared/2"
QUICK_LOCK = {"tokens": 8_192, "end_to_end_tokens": 0, "validation_tokens": 1_024}


def main() -> None:
    """Lock, audit and compare. The table is written after every lock."""
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows, controls = [], list(arguments.controls)
    for depth, init, coupling in itertools.product(arguments.depth, arguments.init, arguments.coupling or [None]):
        name = f"{init}-{depth}" if coupling is None else f"{init}-{depth}-coupling-{coupling:g}"
        try:
            lock = _lock(arguments, name, {"depth": depth, "init": init, "coupling": coupling})
        except DistillationError as error:  # the other locks are still compared
            rows.append({"lock": name, "failed": str(error)})
            _write(arguments, rows)
            continue
        audit = arguments.work / f"audit-{name}"
        config = audit_config(arguments.suite, device=arguments.device)
        with TerminalProgress() as progress:
            progress.say(f"{name}: audit")
            summary = run_audit(str(lock), arguments.model, audit, config, arguments.attack, controls, progress)
        controls.append(audit)
        rows.append(_row(name, summary))
        _write(arguments, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the table: OUT.json and OUT.md")
    parser.add_argument("--work", type=Path, required=True, help="folder for locks and audits")
    parser.add_argument("--model", default="demo", help="the original (demo)")
    parser.add_argument("--depth", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--init", nargs="+", default=["teacher", "random"], choices=["teacher", "random"])
    parser.add_argument(
        "--coupling", type=float, nargs="+", help="couplings to compare; by default only the default of `lockkit lock`"
    )
    parser.add_argument("--suite", default="standard", choices=["quick", "standard", "full"])
    parser.add_argument("--attack", action="append", help="only this attack; may be repeated")
    parser.add_argument(
        "--controls", type=Path, nargs="+", default=[], help="other audits, whose rows of the original are reused"
    )
    parser.add_argument("--data", help="text of the locks, as for `lockkit lock`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small locks and the suite `quick`, to test the tool")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.suite = "quick"
    return arguments


def _lock(arguments: argparse.Namespace, name: str, settings: dict) -> Path:
    """The folder of the lock called `name`. If it does not exist, the lock is made; settings that are None are defaults."""
    out = arguments.work / f"lock-{name}"
    if not (out / "lockkit.json").is_file():
        small = QUICK_LOCK if arguments.quick else {}
        given = {key: value for key, value in (settings | {"data": arguments.data}).items() if value is not None}
        with TerminalProgress() as progress:
            progress.say(f"{name}: lock")
            config = LockConfig(device=arguments.device, **small, **given)
            lock_model(arguments.model, out, config, progress=progress)
    return out


def _row(name: str, summary: dict) -> dict:
    """The entry of one lock."""
    depth = summary["effective_depth"]
    return {
        "lock": name,
        "perplexity_ratio": summary["quality"]["perplexity_ratio"],
        "kl_divergence": summary["quality"]["locked"]["kl_to_original"],
        "text": summary["quality"]["fidelity"]["text"],
        "depth": depth["depth"],
        "effective_depth": {key: depth[key] for key in ("says", "kl_limit", "says_within_5_percent", "kl_by_stages")},
        "unlocks": {
            label: {"kl_to_lock": unlock["kl_to_lock"], "kl_to_original": unlock["kl_to_original"]}
            | {"perplexity_ratio": unlock["perplexity"] / summary["quality"]["original"]["perplexity"]}
            for label, unlock in summary["unlocks"].items()
        },
        "unlock_ratio": summary["unlock_ratio"],
        "owner_advantage": summary["owner_advantage"],
        "verdict": summary["verdict"]["sentence"],
        "amplification": {task: figures["amplification"] for task, figures in summary["tasks"].items()},
        "off_the_shelf": {task: figures["off_the_shelf"] for task, figures in summary["tasks"].items()},
        "runs": summary["runs"],
        "not_tried": summary["not_tried"],
        "config": summary["config"],
        "identity": summary["identity"],
    }


def _write(arguments: argparse.Namespace, rows: list[dict]) -> None:
    record = {
        "schema": SCHEMA,
        "model": arguments.model,
        "suite": arguments.suite,
        "attacks": arguments.attack or "all of the suite",
        "git_hash": git_hash(),
        "versions": versions(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out.with_suffix(".json"), record)
    arguments.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def markdown(record: dict) -> str:
    """The record as two tables: the figures of each lock, and the cheapest attacks on it."""
    rows, tried = [row for row in record["rows"] if "failed" not in row], record["attacks"]
    lines = [
        f"Locks of {record['model']} under the suite `{record['suite']}`, commit {record['git_hash']}. "
        "Every figure is for these attacks; it says nothing about other attacks.",
        "",
        "Attacks: " + (tried if isinstance(tried, str) else ", ".join(f"`{name}`" for name in tried)) + ".",
        "",
        *(f"Perplexity and KL divergence on {MeasuredText(**row['text'])}.\n" for row in rows[:1]),
        "| lock | perplexity over the original's | KL, nats | effective depth | within 5 % perplexity "
        "| unlock ratio | owner's advantage |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        depth = row["effective_depth"]
        lines.append(
            f"| {row['lock']} | {row['perplexity_ratio']:.4f} | {row['kl_divergence']:.5f} "
            f"| {depth['says']} of {row['depth']} | {depth['says_within_5_percent']} of {row['depth']} "
            f"| {_with_caveat(row['unlock_ratio'])} | {_with_caveat(row['owner_advantage'])} |"
        )
    lines += ["", "| lock | task | " + " | ".join(RESOURCES.values()) + " |", "|---|---|" + "---|" * len(RESOURCES)]
    for row in rows:
        for task, found in row["amplification"].items():
            lines.append(f"| {row['lock']} | {task} | " + " | ".join(_cell(found[key]) for key in RESOURCES) + " |")
    lines += [
        "",
        "Cells: the cost of the cheapest attack on the lock over that of the cheapest on the original, to the same held-out "
        "loss. In brackets: the attack on the lock; then the mean over its seeds, over the original's mean, and the range. "
        "`*`: the re-distillation from scratch failed its control at this budget, so the figure is only a bound.",
    ]
    lines += [f"\n{row['lock']}: {row['verdict']}" for row in rows]
    lines += [f"\nNo lock {row['lock']}: {row['failed']}" for row in record["rows"] if "failed" in row]
    return "\n".join(lines) + "\n"


def _with_caveat(figure: dict) -> str:
    return figure["says"] + ("*" if figure.get("caveat") else "")


def _cell(found: dict | None) -> str:
    if found is None:
        return "–"
    if found["value"] is None:
        return found["says"]
    seeds = found.get("seeds")
    spread = f"; {seeds['mean']:.2f}, {seeds['lowest']:.2f} to {seeds['highest']:.2f}" if seeds else ""
    return f"{times(found['value'], found['lowest'], found['highest'])} ({found['best_attack']}{spread})"


if __name__ == "__main__":
    main()
