"""Is a capability absent? Models that should have lost it, beside one that never had it: the cost of relearning.

    python tools/forget_bench.py --work .cache/forget --out tools/results/forgetting
    python tools/forget_bench.py --steps 1024 --candidate d-0.8@0.6 --candidate d-0.8@2 --work .cache/forget --out forgetting
    python tools/forget_bench.py --seed 0 --seed 1 --seed 2 --candidate d-0.8 --work .cache/forget --out forgetting

1. Two texts (forget_text.py): A is kept, D is to be locked out.
2. B is trained on A and D, G ("gold") on the same tokens of A alone (forget_models.py).
3. Each `--candidate` is made from B (forget_candidates.py).
4. For every model: perplexity on A and the loss on D; what text of D in the prompt is worth; tokens until it has learned D
   again, to levels between G and B (forget_relearn.py).

All models and figures are kept in `--work`, so an interrupted run resumes, and one with more candidates or attacks adds
them. OUT.json has all figures. OUT.svg has the curves of relearning of the first seed, and what candidates cost in tokens of
distillation; the table is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from forget_candidates import CANDIDATES, UNLEARNED, candidate_of, distil, unlearn
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
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel

SCHEMA = "lockkit-forgetting/2"
A_TOKENS = 1_600_000
LOCK_DEPTH = 16
STEP_TOKENS = 1024  # of relearning, for the plot
PRICE_BAR, GOLD_BAR = 1.05, 0.8
ALL = (*UNLEARNED, "b", *CANDIDATES)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of models and figures")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, help="of B and of G; by default as the shape has them")
    parser.add_argument("--seed", action="append", type=int, help="of the models; repeatable; by default 0")
    parser.add_argument(
        "--candidate", action="append", type=_candidate_name, help=f"repeatable; {', '.join(ALL)}; by default all"
    )
    parser.add_argument(
        "--attack", action="append", choices=[str(a) for a in ATTACKS], help="repeatable; by default all"
    )
    parser.add_argument("--relearn-steps", type=int, default=192, help="steps of a run, at most")
    parser.add_argument("--stop-share", type=float, choices=SHARES, default=0.9, help="a run ends at this level")
    return parser.parse_args(argv)


def _candidate_name(text: str) -> str:
    try:
        candidate_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


class Bench:
    """The models of one shape and seed, and their figures so far."""

    def __init__(self, arguments: argparse.Namespace, seed: int = 0):
        self.arguments, shape = arguments, SHAPES[arguments.shape]
        self.shape = replace(shape, steps=arguments.steps or shape.steps, seed=seed)
        self.folder = arguments.work / f"{arguments.shape}-{self.shape.steps}{f'-seed{seed}' if seed else ''}"
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
        if name in UNLEARNED:
            return unlearn(UNLEARNED[name], self.model("B"), self.shape, rows, file)
        if name == "b":
            return self.lock_without_chains()
        candidate = candidate_of(name)
        if candidate is None:
            raise ValueError(f"{name} is not made by distillation")
        start = self.model(candidate.teacher)
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


def record_of(benches: list[Bench], argv: list[str]) -> dict:
    """All figures as JSON values."""
    first = benches[0]
    return {
        "schema": SCHEMA,
        "command": "python tools/forget_bench.py " + shlex.join(argv),
        "commit": git_hash(),
        "versions": versions(),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "shape": asdict(first.shape),
        "b_tokens": first.shape.b_tokens,
        "texts": first.texts.record(),
        "stop": str(first.arguments.stop_share),
        "candidates": {name: asdict(how) for name, how in (UNLEARNED | CANDIDATES).items()},
        "seeds": {
            str(bench.shape.seed): {
                "levels": {str(share): level for share, level in bench.levels().items()},
                "models": bench.figures,
            }
            for bench in benches
            if {"B", "G"} <= set(bench.figures)
        },
    }


def tokens_spent(name: str, shape: Shape) -> int:
    """Tokens that a candidate is trained on."""
    candidate = candidate_of(name)
    if candidate is not None:
        return candidate.steps(shape) * (shape.rows_a + shape.rows_d) * shape.block
    if name in UNLEARNED:
        return UNLEARNED[name].steps * (UNLEARNED[name].rows_a + UNLEARNED[name].rows_d) * shape.block
    return LockConfig().tokens if name == "b" else 0


@dataclass
class Row:
    """A model of one seed, in the table.

    Attributes:
        name, seed: of the model.
        spent: tokens of distillation or unlearning over B's training tokens.
        quality, in_context: see forget_relearn.py.
        price: perplexity on A over B's.
        cost: tokens to each level; None where no run reached it, or none was made.
        over: for G and for `a`, the cost of each level over theirs.
        attacked: whether there is any run.
    """

    name: str
    seed: str
    spent: float
    price: float
    quality: dict[str, float]
    in_context: dict[str, float]
    cost: dict[str, float | None]
    over: dict[str, dict[str, float | None]]
    attacked: bool


def rows_of(record: dict, shape: Shape) -> list[Row]:
    """All models of all seeds, in the order in which the models of the first seed were made."""
    rows = []
    for seed, part in record["seeds"].items():
        models = {name: found for name, found in part["models"].items() if "quality" in found}
        cost = {
            name: {share: cheapest(level, found.get("curves", {}).values()) for share, level in part["levels"].items()}
            for name, found in models.items()
        }
        for name, found in models.items():
            rows.append(
                Row(
                    name=name,
                    seed=seed,
                    spent=tokens_spent(name, shape) / record["b_tokens"],
                    price=found["quality"]["perplexity on A"] / models["B"]["quality"]["perplexity on A"],
                    quality=found["quality"],
                    in_context=found["in context"],
                    cost=cost[name],
                    over={o: {s: _ratio(t, cost.get(o, {}).get(s)) for s, t in cost[name].items()} for o in ("G", "a")},
                    attacked=bool(found.get("curves")),
                )
            )
    order = list(dict.fromkeys(row.name for row in rows))
    return sorted(rows, key=lambda row: order.index(row.name))


def markdown(record: dict, shape: Shape) -> str:
    """The table of all models. Costs are tokens, and multiples of those of G and of `a`."""
    shares = [f"{100 * float(share):.0f} %" for share in next(iter(record["seeds"].values()))["levels"]]
    head = [
        "model", "seed", "tokens over B's", "perplexity on A over B's", "loss on D",
        *(f"tokens to {share}" for share in shares), *(f"{share}, over G's" for share in shares[:-1]),
        "90 %, over `a`'s", "D in the prompt, nats",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows_of(record, shape):
        tried = {share: share <= record["stop"] and row.attacked for share in row.cost}
        cells = [
            row.name, row.seed, f"{row.spent:.2f}" if row.spent else "", f"{row.price:.3f}",
            f"{row.quality['loss on D']:.3f}",
            *(_shown(tokens, tried[share]) for share, tokens in row.cost.items()),
            *(_times(row.over["G"][share]) for share in list(row.cost)[:-1]), _times(row.over["a"]["0.9"]),
            f"{row.in_context['after A'] - row.in_context['after D']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(tokens: float | None, of: float | None) -> float | None:
    return tokens / of if tokens is not None and of else None


def _shown(tokens: float | None, tried: bool) -> str:
    if tokens is not None:
        return f"{tokens:,.0f}"
    return "not reached" if tried else ""


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def plot(record: dict, shape: Shape, file: Path) -> None:
    """Curves of relearning of the first seed, and price against robustness for the candidates that were distilled."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    plot_relearning(left, next(iter(record["seeds"].values())))
    plot_price(right, [row for row in rows_of(record, shape) if row.over["G"]["0.9"] is not None])
    with matplotlib.rc_context({"svg.hashsalt": "lockkit"}):
        figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def plot_relearning(axes: Axes, part: dict) -> None:
    """For each model, the lowest loss of any run after as many tokens."""
    for name, found in part["models"].items():
        points = sorted(tuple(point) for curve in found.get("curves", {}).values() for point in curve)
        if points:
            lowest = itertools.accumulate((loss for _, loss in points), min)
            tokens = [tokens + STEP_TOKENS for tokens, _ in points]  # the axis is logarithmic
            axes.plot(tokens, list(lowest), "k--" if name == "G" else "-", label=name, linewidth=1.4)
    for share, level in part["levels"].items():
        axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{float(share):.0%}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set(xscale="log", xlabel=f"tokens of D, and {STEP_TOKENS:,}", ylabel="held-out loss on D, nats per token")
    axes.legend(fontsize=7)


def plot_price(axes: Axes, rows: list[Row]) -> None:
    """Perplexity on A against the cost of relearning, with the bars of the plan."""
    for share, marker in (("0.5", "v"), ("0.75", "s"), ("0.9", "o")):
        shown = [(row.price, over) for row in rows if (over := row.over["G"][share]) is not None]
        axes.plot(
            [x for x, _ in shown], [y for _, y in shown], marker, label=f"{float(share):.0%}", markersize=5, alpha=0.8
        )
    for row in rows:
        label = row.name if row.seed == rows[0].seed else ""
        axes.annotate(label, (row.price, row.over["G"]["0.9"] or 0), fontsize=7, rotation=45, va="bottom")
    axes.axvline(PRICE_BAR, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(GOLD_BAR, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="perplexity on A over B's", ylabel="tokens to relearn, over G's")
    axes.set_ylim(0, max(1.4, axes.get_ylim()[1]))
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    """Make and measure all models. The results are written after each step."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    benches = [Bench(arguments, seed) for seed in arguments.seed or [0]]
    for bench in benches:
        bench.measure("B")
        for name in ("G", *(arguments.candidate or ALL)):
            bench.measure(name)
            bench.relearn(name)
            record = record_of(benches, sys.argv[1:] if argv is None else argv)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out.with_suffix(".json"), record)
            plot(record, bench.shape, arguments.out.with_suffix(".svg"))
            print(markdown(record, bench.shape), flush=True)


if __name__ == "__main__":
    main()
