"""Unlocks of several locks compared, without the fine-tuning that follows.

    lockkit lock demo plain --depth 16
    lockkit lock demo coupled --depth 16 --coupling 1
    python tools/compare_unlocks.py plain coupled --original demo --out tools/results/unlocks

It measures for every lock:

1. Its fidelity: perplexity over the original's, and KL to the original.
2. Closed-form unlocks: the blocks side by side (unchanged, and corrected with few tokens), stacked, linearised, K
   stages, and random features, which use none of the lock's weights. For each: KL of the unlocked model to the lock and
   to the original, and its perplexity over the original's.
3. Re-distillations of `--tokens` tokens, from the linearised stack (warm) and from random features; the best of
   a few learning rates.
4. The similarity of its rows to the teacher's: for each up row, the largest correlation of its pre-activation
   with one of the teacher's, on the lock's own activations; mean over rows and layers.

OUT.json has all figures, OUT.md the table, and OUT.svg a plot of fidelity against resistance to unlocks. Rows of other
locks in OUT.json are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from lockkit.attack.attacks.unlocks.closed_form import (
    CorrectedStack,
    LinearisedStack,
    PartialCollapse,
    RandomFeatures,
    StackSolve,
    mlp_inputs,
)
from lockkit.attack.attacks.unlocks.redistill import Redistill, RedistillConfig
from lockkit.attack.base import CannotRun, Unlocked
from lockkit.attack.config import audit_config
from lockkit.attack.subjects import Subjects
from lockkit.files import read_json, write_json
from lockkit.measure.records import MeasuredText
from lockkit.models.families import decoder_layers, mlp_weights
from lockkit.models.identity import public_name
from lockkit.version import git_hash, versions

SCHEMA = "lockkit-unlocks-compared/1"
CORRELATION_TOKENS = 8_192
REDISTILLED = {"warm": (1e-4, 3e-4, 1e-3), "features": (1e-3, 3e-3)}  # learning rates; the best is taken


def main() -> None:
    """Measure all locks. Table, plot and JSON are written after each one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locked", nargs="+", help="locked models")
    parser.add_argument("--original", default="demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[65_536], help="budgets of re-distillation")
    parser.add_argument("--unlock-tokens", type=int, default=32_768, help="unlabelled tokens for closed-form unlocks")
    options = parser.parse_args()
    if len({public_name(locked) for locked in options.locked}) < len(options.locked):
        parser.error("two locks have the same folder name, by which rows are identified: rename a folder")
    file = options.out.with_suffix(".json")
    record = read_json(file, "--out") if file.is_file() else {"schema": SCHEMA, "rows": []}
    for locked in options.locked:
        row = measure(locked, options.original, options.tokens, options.unlock_tokens)
        record["rows"] = [old for old in record["rows"] if old["lock"] != row["lock"]] + [row]
        write_json(file, record)
        options.out.with_suffix(".md").write_text(markdown(record["rows"]), encoding="utf-8")
        plot(record["rows"], options.out.with_suffix(".svg"))
        print(markdown([row]), flush=True)


def measure(locked: str, original: str, budgets: list[int], unlock_tokens: int) -> dict:
    """The row of one lock."""
    tokens = max([unlock_tokens, *budgets])
    config = audit_config("standard", tasks=["signatures"], redistill_tokens=tokens, unlock_tokens=unlock_tokens)
    bench = Subjects(locked, original, config)
    base = bench.quality_of("original").perplexity

    def figures(unlocked: Unlocked) -> dict:
        quality = bench.quality(unlocked.model)
        return {
            "kl_to_lock": quality.kl_to_lock,
            "kl_to_original": quality.kl_to_original,
            "perplexity_ratio": quality.perplexity / base,
        }

    lock = bench.quality_of("locked")
    unlocks = {}
    for trial in CorrectedStack.trials(config):
        unlocks[f"corrected, {trial.tokens} tokens"] = figures(
            CorrectedStack(trial).unlock(bench.frozen("locked"), bench)
        )
    for attack in (StackSolve, LinearisedStack, PartialCollapse, RandomFeatures):
        for trial in attack.trials(config):
            name = attack.name if trial.stages == 1 else f"{trial.stages} stages"
            with contextlib.suppress(CannotRun):  # the blocks cannot be divided into these stages
                unlocks[name] = figures(attack(trial).unlock(bench.frozen("locked"), bench))
    for budget in budgets:
        for start, rates in REDISTILLED.items():
            trials = [RedistillConfig(start=start, learning_rate=rate, tokens=budget, points=1) for rate in rates]
            tried = [figures(Redistill(trial).unlock(bench.frozen("locked"), bench)) for trial in trials]
            unlocks[f"{start}, {budget} tokens"] = min(tried, key=lambda found: found["kl_to_lock"])
    return {
        "lock": bench.names["locked"],
        "original": bench.names["original"],
        "recipe": bench.record.get("recipe"),
        "kl_to_original": lock.kl_to_original,
        "perplexity_ratio": lock.perplexity / base,
        "text": bench.text.record(),
        "row_correlation": row_correlation(bench),
        "unlocks": unlocks,
        "commit": git_hash(),
        "versions": versions(),
        "machine": {"cores": os.cpu_count()},
    }


@torch.no_grad()
def row_correlation(bench: Subjects) -> float:
    """The largest correlation of an up row with a row of the teacher's; mean over layers and rows."""
    locked, original = bench.frozen("locked"), bench.frozen("original")
    rows = bench.unlabelled[: CORRELATION_TOKENS // bench.text_block]
    means = []
    for index, x in enumerate(mlp_inputs(locked, rows, bench)):
        chain, teacher = decoder_layers(locked)[index].mlp, decoder_layers(original)[index].mlp
        before: list[torch.Tensor] = []
        keep = functools.partial(_keep_output, before)
        hooks = [block.up_proj.register_forward_hook(keep) for block in chain.blocks]
        chain(x)
        for hook in hooks:
            hook.remove()
        own, theirs = torch.cat(before, 1), x @ mlp_weights(teacher, bench.family).up.T
        own, theirs = (F.normalize(values - values.mean(0), dim=0) for values in (own, theirs))
        means.append((own.T @ theirs).abs().amax(1).mean().item())
    return sum(means) / len(means)


def _keep_output(into: list[torch.Tensor], _module: object, _args: tuple, output: torch.Tensor) -> None:
    into.append(output)


def markdown(rows: list[dict]) -> str:
    """The table. Cells of unlocks: KL to the lock / KL to the original / perplexity over the original's."""
    names = list(dict.fromkeys(name for row in rows for name in row["unlocks"]))
    texts = {str(MeasuredText(**row["text"])) for row in rows if "text" in row}
    lines = [
        *(f"Perplexity and KL divergence on {text}.\n" for text in sorted(texts)),
        "| lock | KL to the original | perplexity over the original's | row correlation | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [
            "{kl_to_lock:.4f} / {kl_to_original:.4f} / {perplexity_ratio:.3f}".format(**row["unlocks"][name])
            if name in row["unlocks"]
            else ""
            for name in names
        ]
        lines.append(
            f"| {row['lock']} | {row['kl_to_original']:.4f} | {row['perplexity_ratio']:.4f} "
            f"| {row['row_correlation']:.2f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], file: Path) -> None:
    """KL of the unlocked models to each lock, against the perplexity that the lock adds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    excess = {row["lock"]: 100 * (row["perplexity_ratio"] - 1) for row in rows}
    rows = [row for row in rows if excess[row["lock"]] > 0]  # the axis is logarithmic
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    names = dict.fromkeys(name for row in rows for name in row["unlocks"] if not name.endswith("stages"))
    for name in names:
        points = [(excess[row["lock"]], row["unlocks"][name]["kl_to_lock"]) for row in rows if name in row["unlocks"]]
        without_weights = name.startswith("features") or name == "random-features"
        axes.plot(*zip(*points, strict=True), "x" if without_weights else "o", markersize=5, label=name)
    for row in rows:
        place = (excess[row["lock"]], 1.1e-3)
        axes.annotate(row["lock"], place, rotation=90, va="bottom", ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", ylim=(1e-3, 1))
    axes.set(
        xlabel="perplexity of the lock above the original's, %",
        ylabel="KL of the unlocked model to the lock, nats per token",
    )
    figure.legend(loc="outside right upper", fontsize=8, title="x: uses none of\nthe lock's weights", title_fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "lockkit"}):
        figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
