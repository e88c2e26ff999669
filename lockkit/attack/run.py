"""The audit, from two folders to rows and a summary.

1. Load and match the models, tasks and text (bench.py).
2. Reference: fine-tune the original with the baseline at every learning rate; the target loss of a
   task is set by the best of these.
3. Every attack at the same settings on the original (positive control), then on the lock. An
   unlock is first run on a chain that *is* the original, then on the lock; what it makes is
   fine-tuned with all weights, and both are charged.
4. A row is appended to `rows.jsonl` when it is done. Its key is a hash of everything it depends
   on, so an interrupted audit goes on where it stopped, and a changed one does not reuse old rows.
5. `summary.json`: target, headline, figures of the lock, what was not tried.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pydantic import BaseModel

from lockkit.attack.base import Attack, CannotRun, GradientAttack, Probe, UnlockAttack, Unlocked, attack_class, registry
from lockkit.attack.bench import Bench
from lockkit.attack.config import AuditConfig
from lockkit.attack.cost import Cost
from lockkit.attack.finetune import FinetuneResult
from lockkit.attack.summary import summarise
from lockkit.errors import UsageError
from lockkit.files import new_folder, readable_disk_errors, write_json
from lockkit.lock.initialise import start_from_teacher
from lockkit.models.families import decoder_layers, mlp_weights
from lockkit.models.locked import locked_classes
from lockkit.models.save import copy_tokenizer, render_modeling_file
from lockkit.progress import NoProgress, Progress

SCHEMA = "lockkit-attack/1"
ROWS, SUMMARY = "rows.jsonl", "summary.json"
# What PyTorch says on CUDA, on Windows and on Linux; its class of error is a plain RuntimeError on the last two.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def run_audit(
    locked: str,
    original: str,
    out: Path,
    config: AuditConfig,
    attacks: list[str] | None = None,
    progress: Progress | None = None,
) -> dict:
    """Attack a lock; return the summary that is written to `out`.

    Raises:
        UsageError: models, tasks, attacks or `out` cannot be used as given.
    """
    progress = progress or NoProgress()
    chosen = [attack_class(name) for name in attacks] if attacks else _of_suite(config)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ROWS).is_file())):
        raise UsageError(f"{out} exists and is not an audit to go on with: change --out")
    bench = Bench(locked, original, config)
    with readable_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        audit = Audit(bench, out, progress)
        audit.references()
        for attack in chosen:
            audit.attack(attack)
        summary = summarise(bench, audit.used, chosen)
        temporary = out / f".{SUMMARY}.partial"
        write_json(temporary, summary)
        temporary.replace(out / SUMMARY)
    return summary


def _of_suite(config: AuditConfig) -> list[type[Attack]]:
    return [attack for attack in registry().values() if attack.in_quick or config.suite != "quick"]


class Audit:
    """One audit: the rows it has, and how it makes more."""

    def __init__(self, bench: Bench, out: Path, progress: Progress):
        self.bench, self.out, self.progress = bench, out, progress
        self.rows = _read_rows(out / ROWS)
        self.used: list[dict] = []  # rows of this audit, old and new
        self.targets: dict[str, tuple[float, float]] = {}  # task: start and target

    def references(self) -> None:
        """Fine-tune the original; set each task's target."""
        baseline = attack_class("full-ft")
        for task in self.bench.tasks:
            rows = [self._gradient(baseline, c, task, "original") for c in baseline.trials(self.bench.config)]
            finished = [row for row in rows if row["status"] == "finished"]
            if not finished:
                raise UsageError(
                    f"the original cannot be fine-tuned on {task}: change --learning-rates or --batch-rows"
                )
            start, best = finished[0]["start_loss"], min(row["best_loss"] for row in finished)
            if best >= start:
                raise UsageError(
                    f"fine-tuning does not improve the original on {task}: change --learning-rates or --steps"
                )
            target = start - self.bench.config.target_share * (start - best)
            self.targets[task] = (start, target)
            self.progress.say(f"{task}: held-out loss of the original {start:.3f}, target {target:.3f}")

    def attack(self, attack: type[Attack]) -> None:
        """All rows of one attack: trials, tasks, seeds; control first."""
        if issubclass(attack, Probe):
            for config in attack.trials(self.bench.config):
                self._row(attack, config, None, "locked", lambda c=config: attack(c).probe(self.bench))
            return
        for task in self.bench.tasks:
            for config in attack.trials(self.bench.config):
                if issubclass(attack, UnlockAttack):
                    self._unlock(attack, config, task)
                    continue
                for seed in range(self.bench.config.seeds if attack.headline else 1):
                    seeded = config.model_copy(update={"seed": self.bench.config.seed + seed})
                    self._gradient(attack, seeded, task, "original")
                    self._gradient(attack, seeded, task, "locked")

    def _gradient(self, attack: type[GradientAttack], config, task: str, subject: str) -> dict:
        def work() -> dict:
            return _run_record(attack(config).run(self.bench.load(subject), self.bench, self.bench.tasks[task]))

        return self._row(attack, config, task, subject, work)

    def _unlock(self, attack: type[UnlockAttack], config: BaseModel, task: str) -> None:
        control = self._row(attack, config, None, "original", lambda: self._unlock_control(attack, config))
        if control["status"] == "finished":
            baseline = attack_class("full-ft")
            for settings in baseline.trials(self.bench.config):
                both = {"unlock": config.model_dump(), "finetune": settings.model_dump()}
                self._row(
                    attack, both, task, "locked", lambda s=settings: self._unlock_and_finetune(attack, config, s, task)
                )

    def _unlock_control(self, attack: type[UnlockAttack], config: BaseModel) -> dict:
        bench = self.bench
        unlocked = attack(config).unlock(original_as_chain(bench), bench)
        emptied = bench.load("original").requires_grad_(False)
        for layer in decoder_layers(emptied):
            for weight in layer.mlp.parameters():
                weight.zero_()
        worst, left = bench.quality(emptied).kl_to_original, bench.quality(unlocked.model).kl_to_original
        share = 1 - left / worst
        return {
            "control_passed": share >= attack.control_share,
            "control_kl": left,
            "kl_without_mlps": worst,
            "won_back": share,
            "cost": unlocked.cost.record(),
        }

    def _unlock_and_finetune(self, attack, config, settings, task: str) -> dict:
        unlocked, record = self._unlocked(attack, config)
        model = unlocked.model.requires_grad_(True)
        result = attack_class("full-ft")(settings).run(model, self.bench, self.bench.tasks[task])
        return _run_record(result, unlocked.cost) | {"unlock": record}

    def _unlocked(self, attack, config) -> tuple[Unlocked, dict]:
        """The unlocked model, made once and saved; later rows load what was saved."""
        from lockkit.models.load import load_model, no_progress_bars

        key = _key([attack.name, config.model_dump(), self.bench.identity()])
        folder = self.out / "unlocked" / f"{attack.name}-{key[:12]}"
        if not (folder / "unlock.json").is_file():
            made = attack(config).unlock(self.bench.frozen("locked"), self.bench)
            record = {
                "folder": str(folder.relative_to(self.out)),
                "blocks": made.blocks,
                "architecture": type(made.model).__name__,
                **self.bench.quality(made.model).record(),
                "cost": made.cost.record(),
                "notes": made.notes,
            }
            folder.parent.mkdir(exist_ok=True)
            with new_folder(folder) as temporary:
                with no_progress_bars():
                    made.model.save_pretrained(temporary)
                copy_tokenizer(self.bench.folders["original"], temporary)
                if made.blocks > 1:
                    file = temporary / "modeling_dlr_lock.py"
                    file.write_text(render_modeling_file(self.bench.family), encoding="utf-8")
                write_json(temporary / "unlock.json", record)
        record = json.loads((folder / "unlock.json").read_text(encoding="utf-8"))
        model, _ = load_model(folder, torch.float32, str(self.bench.device))
        return Unlocked(model, record["blocks"], Cost(**record["cost"]), record["notes"]), record

    def _row(self, attack: type[Attack], config, task: str | None, subject: str, work) -> dict:
        """Run `work` unless its row is there; whatever goes wrong in one attack stays in its row."""
        settings = config if isinstance(config, dict) else config.model_dump()
        task_hash = self.bench.tasks[task].record() if task else None
        key = _key([SCHEMA, attack.name, settings, subject, task_hash, self.bench.identity()])
        if key not in self.rows:
            row = {
                "schema": SCHEMA,
                "key": key,
                "attack": attack.name,
                "family": attack.family,
                "lock_aware": attack.lock_aware,
                "model": subject,
                "task": task,
                "config": settings,
            }
            self.progress.start(f"{attack.name} on the {subject}" + (f", {task}" if task else ""), 1)
            row |= _guarded(work)
            row["finished"] = True
            if row["status"] != "out-of-memory":  # another machine may have more
                self.rows[key] = row
            with (self.out / ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.progress.finish(row.get("note") or _short(row))
        row = self.rows.get(key, locals().get("row"))
        if row not in self.used:
            self.used.append(row)
        return row


def _guarded(work) -> dict:
    """Run; tell apart finished, diverged, not possible here, out of memory, failed."""
    try:
        found = work()
        return {"status": "diverged" if found.get("diverged") else "finished", "note": "", **found}
    except CannotRun as reason:
        return {"status": "unavailable", "note": str(reason)}
    except Exception as error:
        memory = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        reason = " ".join(str(error).split())[:200]
        return {
            "status": "out-of-memory" if memory else "failed",
            "note": "out of memory" if memory else f"{type(error).__name__}: {reason}",
        }
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _short(row: dict) -> str:
    if "best_loss" in row:
        return f"held-out loss {row['start_loss']:.3f} -> {row['best_loss']:.3f}"
    return "" if "won_back" not in row else f"control wins back {row['won_back']:.1%}"


def _run_record(result: FinetuneResult, before: Cost | None = None) -> dict:
    """A run's figures; the cost of what came `before` is in every point and in the total."""
    before = before or Cost()
    curve = [
        point.record()
        | {
            "tokens": point.tokens + before.tokens,
            "flops": point.flops + before.flops,
            "seconds": point.seconds + before.seconds,
        }
        for point in result.curve
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


def original_as_chain(bench: Bench):
    """The original in the lock's architecture: its own units in blocks that do not depend on each other."""
    original, config = bench.frozen("original"), bench.frozen("locked").config
    model = locked_classes(bench.family)[1](config).to(bench.device, torch.float32)
    rest = {key: value for key, value in original.state_dict().items() if ".mlp." not in key}
    model.load_state_dict(rest, strict=False)
    model.tie_weights()
    for index, (layer, teacher) in enumerate(zip(decoder_layers(model), decoder_layers(original), strict=True)):
        start_from_teacher(layer.mlp, mlp_weights(teacher.mlp, bench.family), seed=index)
        layer.mlp.gain = 0.0
    return model.requires_grad_(False).eval()


def _key(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _read_rows(path: Path) -> dict[str, dict]:
    """Finished rows by key; a line cut short by an interruption is passed over."""
    found: dict[str, dict] = {}
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("finished") and row.get("status") not in ("out-of-memory", "failed"):
                found[row["key"]] = row
    return found


__all__ = ["ROWS", "SCHEMA", "SUMMARY", "run_audit"]
