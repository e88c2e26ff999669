"""Is a capability absent? Models that should have lost it, beside one that never had it: the cost of relearning.

    python tools/forget_bench.py --work .cache/forget --out tools/results/forgetting
    python tools/forget_bench.py --shape demo --candidate a --candidate e-0.8 --work .cache/forget --out forgetting-demo

1. Two texts (forget_text.py): A is kept, D is to be locked out.
2. B is trained on A and D, G ("gold") on the same tokens of A alone (forget_models.py).
3. Each `--candidate` is made from B (forget_candidates.py).
4. For every model: perplexity on A and the loss on D; what text of D in the prompt is worth; tokens until it has learned D
   again, to levels between G and B (forget_relearn.py).

All models and figures are kept in `--work`, so an interrupted run resumes, and one with more candidates or attacks adds
them. OUT.json has all figures, OUT.svg the curves of relearning; the table is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from forget_candidates import CANDIDATES, UNLEARN_STEPS, distil, unlearn
from forget_models import SHAPES, Shape, fit, pretraining_loss, random_model
from forget_relearn import ATTACKS, SHARES, cheapest, in_context, levels, quality, relearn, task_of
from forget_text import Texts, load_texts

from lockkit.attack.rebuild import ordinary_model
from lockkit.dlr.view import side_by_side
from lockkit.files import read_json, write_json
from lockkit.lock.config import LockConfig
from lockkit.lock.run import lock_model
from lockkit.models.families import decoder_layers
from lockkit.models.load import DEMO, load_model, load_tokenizer
from lockkit.version import git_hash, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "lockkit-forgetting/1"
A_TOKENS = 1_600_000
LOCK_DEPTH = 16
STEP_TOKENS = 1024  # of relearning, for the plot
ALL = ("a", "b", *CANDIDATES)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of models and figures")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, help="of B and of G; by default as the shape has them")
    parser.add_argument("--candidate", action="append", choices=ALL, help="repeatable; by default all")
    parser.add_argument(
        "--attack", action="append", choices=[str(a) for a in ATTACKS], help="repeatable; by default all"
    )
    parser.add_argument("--relearn-steps", type=int, default=192, help="steps of a run, at most")
    parser.add_argument("--stop-share", type=float, choices=SHARES, default=0.9, help="a run ends at this level")
    return parser.parse_args(argv)


class Bench:
    """The models of one shape, and their figures so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, shape = arguments, SHAPES[arguments.shape]
        self.shape = replace(shape, steps=arguments.steps or shape.steps)
        self.folder = arguments.work / f"{arguments.shape}-{self.shape.steps}"
        self.tokenizer = load_tokenizer(DEMO)
        cache = arguments.work / f"texts-{self.shape.block}.pt"
        self.texts: Texts = load_texts(self.tokenizer, self.shape.block, {"A": A_TOKENS}, cache)
        self.file = self.folder / "figures.json"
        self.figures: dict[str, Any] = read_json(self.file, "--work") if self.file.is_file() else {}

    def model(self, name: str) -> PreTrainedModel:
        """B, G or a candidate, trained if it was not."""
        file, rows = self.folder / f"{name}.pt", self.texts.rows
        if name in ("B", "G"):
            loss = pretraining_loss(self.shape, rows["A"], rows["D"] if name == "B" else None)
            return fit(random_model(self.shape, self.tokenizer), loss, self.shape.arguments(), file)
        if name == "a":
            return unlearn(self.model("B"), self.shape, rows, file)
        if name == "b":
            return self.lock_without_chains()
        candidate = CANDIDATES[name]
        start = self.model("a" if candidate.unlearned else "B")
        model, sizes = distil(candidate, start, self.shape, rows["A"], file)
        self.figures.setdefault(name, {})["noise over weights"] = sizes
        return model

    def lock_without_chains(self) -> PreTrainedModel:
        """The candidate `b`: B is locked, and the blocks of each chain are put side by side (`corrected-stack`)."""
        out = self.folder / "lock"
        if not out.is_dir():
            self.model("B").save_pretrained(self.folder / "B")
            self.tokenizer.save_pretrained(self.folder / "B")
            text = self.folder / "A.jsonl"
            decoded = (self.tokenizer.decode(row) for row in self.texts.rows["A"][-2000:])
            text.write_text("".join(json.dumps({"text": row}) + "\n" for row in decoded), encoding="utf-8")
            config = LockConfig(depth=LOCK_DEPTH, data=str(text), other_texts=["none"], device="cpu")
            lock_model(str(self.folder / "B"), out, config)
        locked, family = load_model(out, torch.float32)
        self._once("b", "locked", lambda: quality(locked, self.texts.rows))
        return ordinary_model(locked, family, [side_by_side(layer.mlp) for layer in decoder_layers(locked)])

    def measure(self, name: str) -> None:
        """Make a model, and measure what was not measured before."""
        model = self.model(name)
        self._once(name, "quality", lambda: quality(model, self.texts.rows))
        self._once(name, "in context", lambda: in_context(model, self.texts.rows, self.shape.block * 5 // 8))
        print(name, json.dumps(self.figures[name]["quality"]), json.dumps(self.figures[name]["in context"]), flush=True)

    def relearn(self, name: str) -> None:
        """Run the attacks on a model that were not run before."""
        at = self.levels()
        stop, steps = at[self.arguments.stop_share], self.arguments.relearn_steps
        task = task_of(self.texts.rows)
        curves = self.figures[name].setdefault("curves", {})
        for attack in ATTACKS:
            chosen = str(attack) in (self.arguments.attack or map(str, ATTACKS))
            if chosen and f"{attack} to {stop:.4f}" not in curves:
                curves[f"{attack} to {stop:.4f}"] = relearn(self.model(name), attack, task, stop, at[0.5], steps)
                self.save()
                found = {share: cheapest(level, curves.values()) for share, level in at.items()}
                print(f"{name}: {attack}: tokens by level, cheapest so far: {found}", flush=True)

    def levels(self) -> dict[float, float]:
        """The losses to reach, see forget_relearn.py."""
        return levels(*(self.figures[name]["quality"]["loss on the task"] for name in ("G", "B")))

    def _once(self, name: str, what: str, measure: Callable[[], dict[str, float]]) -> None:
        found = self.figures.setdefault(name, {})
        if what not in found:
            found[what] = measure()
            self.save()

    def save(self) -> None:
        """Write the figures to the work folder."""
        write_json(self.file, self.figures)


def record_of(bench: Bench, argv: list[str]) -> dict:
    """All figures as JSON values."""
    return {
        "schema": SCHEMA,
        "command": "python tools/forget_bench.py " + shlex.join(argv),
        "commit": git_hash(),
        "versions": versions(),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "shape": asdict(bench.shape),
        "b_tokens": bench.shape.b_tokens,
        "seeds": 1,
        "texts": bench.texts.record(),
        "levels": {str(share): level for share, level in bench.levels().items()},
        "stop": str(bench.arguments.stop_share),
        "candidates": {name: asdict(candidate) for name, candidate in CANDIDATES.items()},
        "models": bench.figures,
    }


def tokens_spent(name: str, shape: Shape) -> int:
    """Tokens that a candidate is trained on."""
    if name in CANDIDATES:
        return CANDIDATES[name].steps(shape) * (shape.rows_a + shape.rows_d) * shape.block
    return {"a": UNLEARN_STEPS * 8 * shape.block, "b": LockConfig().tokens}.get(name, 0)


def markdown(record: dict, shape: Shape) -> str:
    """The table of all models. Costs are tokens, and multiples of those of G and of `a`."""
    models = record["models"]
    cost = {
        name: {s: cheapest(level, found.get("curves", {}).values()) for s, level in record["levels"].items()}
        for name, found in models.items()
    }
    lines = [
        "| model | tokens over B's | perplexity on A over B's | loss on D | tokens to 50 % | 90 % | 100 % "
        "| 90 %, over G's | over `a`'s | D in the prompt, nats |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        if "quality" not in found:
            continue
        own, base = found["quality"], models["B"]["quality"]
        spent = tokens_spent(name, shape) / shape.b_tokens
        shown = [_shown(tokens, tried=s <= record["stop"]) for s, tokens in cost[name].items()]
        shown = shown if found.get("curves") else [""] * len(shown)
        over = [_over(cost[name]["0.9"], cost.get(other, {}).get("0.9")) for other in ("G", "a")]
        prompt = found["in context"]["after A"] - found["in context"]["after D"]
        ratio = own["perplexity on A"] / base["perplexity on A"]
        lines.append(
            f"| {name} | {f'{spent:.2f}' if spent else ''} | {ratio:.3f} | {own['loss on D']:.3f} "
            f"| {' | '.join([*shown, *over])} | {prompt:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _shown(tokens: float | None, tried: bool) -> str:
    if tokens is not None:
        return f"{tokens:,.0f}"
    return "not reached" if tried else "not tried"


def _over(tokens: float | None, of: float | None) -> str:
    return f"{tokens / of:.2f}" if tokens is not None and of else ""


def plot(record: dict, file: Path) -> None:
    """Curves of relearning: for each model, the lowest loss of any run after as many tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, found in record["models"].items():
        points = sorted(tuple(point) for curve in found.get("curves", {}).values() for point in curve)
        if points:
            lowest = itertools.accumulate((loss for _, loss in points), min)
            tokens = [tokens + STEP_TOKENS for tokens, _ in points]  # the axis is logarithmic
            axes.plot(tokens, list(lowest), "k--" if name == "G" else "-", label=name, linewidth=1.4)
    for share, level in record["levels"].items():
        axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{float(share):.0%}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set(xscale="log", xlabel=f"tokens of D, and {STEP_TOKENS:,}", ylabel="held-out loss on D, nats per token")
    figure.legend(loc="outside right upper", fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "lockkit"}):
        figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Make and measure all models. The results are written after each step."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    bench = Bench(arguments)
    bench.measure("B")
    for name in ("G", *(arguments.candidate or ALL)):
        bench.measure(name)
        bench.relearn(name)
        record = record_of(bench, sys.argv[1:] if argv is None else argv)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out.with_suffix(".json"), record)
        plot(record, arguments.out.with_suffix(".svg"))
        print(markdown(record, bench.shape), flush=True)


if __name__ == "__main__":
    main()
