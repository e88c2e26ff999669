"""What lowers the loss of a lock at equal tokens: every idea against the plain recipe, in one table.

    python tools/compare_phases.py --out tools/results/phases.json

Each row is a lock of `demo` that differs from the plain recipe in one thing. The plain recipe is the
one lockkit began with, so that rows stay comparable; the last row is today's. What proved useful
is an option of `lockkit lock` or its default; what did not lives here alone, as a function that
replaces one piece of the pipeline, so that the comparison can be run again. A coupling of 0.5,
twice the default, makes differences show. Needs `pip install schedulefree` for two rows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from lockkit.errors import DistillationError
from lockkit.files import read_json, write_json
from lockkit.lock import modulewise
from lockkit.lock import optimiser as adam
from lockkit.lock.config import LockConfig
from lockkit.lock.data import DistillationData, load_data, sample_from_model
from lockkit.lock.end_to_end import EndToEnd
from lockkit.lock.initialise import fill_blocks
from lockkit.lock.meter import FidelityMeter, mlp_replaced
from lockkit.lock.modulewise import LayerTask, distil_layers
from lockkit.lock.optimiser import RelativeAdam
from lockkit.lock.stack import ChainStack
from lockkit.lock.work import Work
from lockkit.models.activation_cache import ActivationCache
from lockkit.models.capture import LayerwiseCapture
from lockkit.models.families import mlp_weights, require_unlocked
from lockkit.models.layered import StreamedModel
from lockkit.models.load import DEMO, load_config, load_model, load_tokenizer
from lockkit.progress import NoProgress
from lockkit.version import git_hash, versions
from lockkit.workers import Workers

Patch = Callable[[], contextlib.AbstractContextManager]


class Bench:
    """The bundled model, its text and its MLPs' inputs, shared by all rows."""

    def __init__(self, plain: LockConfig):
        config = load_config(DEMO)
        self.family = require_unlocked(config, "demo")
        self.stream = StreamedModel(DEMO, config, self.family, "cpu")
        self.stream.keep_layers = True
        self.data = load_data(plain, "stdlib", config, load_tokenizer(DEMO))
        self.final = FidelityMeter(self.stream, self.data.evaluation)
        self.validation = FidelityMeter(self.stream, self.data.validation)

    def lock(self, config: LockConfig, data: DistillationData, propagated: bool = False) -> dict:
        """Both phases; returns the figures of a row."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            captures = [
                LayerwiseCapture(self.stream, rows, ActivationCache(Path(folder), 10**10), name, Workers())
                for name, rows in (("train", data.train), ("validation", data.validation))
            ]
            chains, errors, rates = [], [], []
            for index in range(len(self.stream)):
                with self.stream.layer(index) as layer:
                    inputs = [torch.empty_like(capture.hidden) for capture in captures]
                    before = [capture.hidden.clone() for capture in captures]
                    for capture, into in zip(captures, inputs, strict=True):
                        capture.advance(index, layer, into)
                    task = LayerTask(
                        index, layer.mlp, mlp_weights(layer.mlp, self.family), *(x.flatten(0, 1) for x in inputs)
                    )
                    [(chain, result)] = distil_layers([task], config, NoProgress())
                    if propagated:  # the next layer sees this one's error
                        for capture, hidden in zip(captures, before, strict=True):
                            capture.hidden.copy_(hidden)
                            with mlp_replaced(layer, chain):
                                capture.advance(index, layer, None)
                chains.append(chain)
                errors.append(result.nmse)
                rates.append(result.learning_rate)
            after_phase_1 = self.final.measure(lambda index: chains[index])
            row = {"nmse": sum(errors) / len(errors), "worst_nmse": max(errors), "learning_rates": rates}
            row |= {"phase_1": after_phase_1.record()}
            if config.end_to_end_tokens >= config.end_to_end_batch_tokens:
                stack = ChainStack(self.stream, lambda index: chains[index], config)
                work = Work(Path(folder) / "work")
                phase_2 = EndToEnd(
                    self.stream, stack, data.train, self.validation, config, work, Workers(), NoProgress()
                ).run()
                row |= {"phase_2": self.final.measure(stack.chain).record(), "end_to_end": phase_2.record()}
        return row | {"seconds": time.perf_counter() - started}


# --- pieces that rows replace


@contextlib.contextmanager
def training(warm_up: float = 0.03, attempts: int = 1) -> Iterator[None]:
    """Share of the steps of a warm-up, and how often a layer that diverged is tried; as the plain recipe has them.

    With one attempt, a loss that runs away and comes back is let go on.
    """
    diverged = modulewise.DIVERGED_NMSE if attempts > 1 else float("inf")
    with (
        mock.patch.object(adam, "WARM_UP_SHARE", warm_up),
        mock.patch.object(modulewise, "ATTEMPTS", attempts),
        mock.patch.object(modulewise, "DIVERGED_NMSE", diverged),
    ):
        yield


@contextlib.contextmanager
def units_in_order(order_of: Callable) -> Iterator[None]:
    """Deal units out to blocks in the order `order_of(weights)` instead of at random."""

    def start(chain, weights, seed):
        fill_blocks(chain, weights, order_of(weights))

    with mock.patch.object(modulewise, "start_from_teacher", start):
        yield


def by_size(weights) -> torch.Tensor:
    return (weights.down.norm(dim=0) * weights.up.norm(dim=1)).argsort(descending=True)


def by_likeness(weights) -> torch.Tensor:
    """Along the first principal direction of the units' reading rows: like units share a block."""
    rows = torch.nn.functional.normalize(weights.gate, dim=1)
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[0][:, 0].argsort()


@contextlib.contextmanager
def every_output_alike() -> Iterator[None]:
    """Each output's error over its own variance, instead of all errors over all variance."""
    plain = modulewise.nmse

    def weighted(student, teacher):
        if not student.requires_grad:
            return plain(student, teacher)
        variance = (teacher - teacher.mean(-2, keepdim=True)).square().mean(-2, keepdim=True)
        return ((student - teacher).square() / variance.clamp_min(1e-12)).mean((-2, -1))

    with mock.patch.object(modulewise, "nmse", weighted):
        yield


def by_sensitivity(bench: Bench) -> Patch:
    """Each output's error weighted by the mean square of the next-token loss's gradient there."""
    model, _ = load_model(DEMO, torch.float32)
    squares: list[torch.Tensor] = []

    def note(_module, _inputs, output):
        output.register_hook(lambda gradient: squares.append(gradient.square().mean((0, 1))))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(note)
    model(bench.data.train[:16], labels=bench.data.train[:16]).loss.backward()
    weights = iter(list(reversed(squares)))

    @contextlib.contextmanager
    def patch() -> Iterator[None]:
        plain, current = modulewise.nmse, {}

        def weighted(student, teacher):
            if not student.requires_grad:
                current.pop("weight", None)
                return plain(student, teacher)
            if "weight" not in current:
                current["weight"] = (weight := next(weights)) / weight.mean()
            return (current["weight"] * (student - teacher).square()).mean((-2, -1)) / (
                teacher - teacher.mean(-2, keepdim=True)
            ).square().mean((-2, -1))

        with mock.patch.object(modulewise, "nmse", weighted):
            yield

    return patch


class Muon:
    """Momentum whose matrices are orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), in batches."""

    def __init__(self, parameters, share: float, steps: int):
        self.parameters, self.share = list(parameters), share
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.schedule = RelativeAdam([torch.nn.Parameter(torch.zeros(1))], share, steps)._schedule

    @torch.no_grad()
    def step(self, step: int) -> None:
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            momentum.lerp_(parameter.grad, 0.05)
            x = parameter.grad.lerp(momentum, 0.95)
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
            flat = x if x.shape[-2] <= x.shape[-1] else x.mT
            for _ in range(5):
                gram = flat @ flat.mT
                flat = 3.4445 * flat + (-4.7750 * gram + 2.0315 * gram @ gram) @ flat
            x = flat if x.shape[-2] <= x.shape[-1] else flat.mT
            rms = x.square().mean((-2, -1), keepdim=True).sqrt()
            parameter -= self.share * self.schedule(step) * x / rms.clamp_min(1e-12) * 0.5
            parameter.grad = None


class ScheduleFree:
    """Schedule-free AdamW (Defazio et al. 2024), from its authors' package."""

    def __init__(self, parameters, share: float, steps: int):
        import schedulefree

        self.optimiser = schedulefree.AdamWScheduleFree(
            list(parameters), lr=share, betas=(0.9, 0.95), eps=1e-12, warmup_steps=max(1, steps // 30)
        )
        self.steps = steps
        self.optimiser.train()

    def step(self, step: int) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if step == self.steps - 1:
            self.optimiser.eval()


def optimiser(kind: type) -> Patch:
    return lambda: mock.patch.object(modulewise, "RelativeAdam", kind)


@contextlib.contextmanager
def hidden_states(weight: float) -> Iterator[None]:
    """Phase 2 on logits and hidden states: `weight` times the mean NMSE of every decoder layer's output."""
    forward, loss, take_input = EndToEnd._forward, EndToEnd._loss, ChainStack.take_input
    gradients: dict[int, torch.Tensor] = {}  # by layer whose input it is of

    def pull(run: EndToEnd, student: torch.Tensor, teacher: torch.Tensor, share: float) -> torch.Tensor:
        variance = (teacher - teacher.mean((0, 1))).square().mean()
        return 2 * (student - teacher) / (variance * teacher.numel()) * (weight * share / len(run.stream))

    def with_gradients(run, ids):
        arguments, teacher, student = forward(run, ids)
        own = run.stream.begin(ids)[0]
        with torch.no_grad():
            for index in range(len(run.stream) - 1):
                with run.stream.layer(index) as layer:
                    own = layer(own, **arguments[index])
                gradients[index + 1] = pull(run, run.stack.inputs[index + 1], own, len(ids) / run.batch_rows)
        return arguments, teacher, student

    def with_last(run, ids, teacher, student, share):
        value, gradient = loss(run, ids, teacher, student, share)
        return value, gradient + pull(run, student, teacher, share)

    def hooked(stack, index):
        hidden = take_input(stack, index)
        if index:
            hidden.requires_grad_(True).register_hook(lambda gradient: gradient + gradients[index])
        return hidden

    with (
        mock.patch.object(EndToEnd, "_forward", with_gradients),
        mock.patch.object(EndToEnd, "_loss", with_last),
        mock.patch.object(ChainStack, "take_input", hooked),
    ):
        yield


def rows_of(bench: Bench, plain: LockConfig) -> Iterator[tuple[str, LockConfig, Patch, dict]]:
    """Name, recipe, replaced piece and further arguments of each row."""

    def change(**values) -> LockConfig:
        return plain.model_copy(update=values)

    nothing = contextlib.nullcontext
    yield "plain recipe", plain, nothing, {}
    yield "--init random", change(init="random"), nothing, {}
    for share in (0.0, 0.25, 0.75, 1.0):
        yield f"coupling raised over {share:.0%} of the steps (plain 50 %)", change(ramp_share=share), nothing, {}
    yield "units dealt out by size", plain, lambda: units_in_order(by_size), {}
    yield "like units in one block", plain, lambda: units_in_order(by_likeness), {}
    yield "inputs with the student's own upstream error", plain, nothing, {"propagated": True}
    yield "each output over its own variance", plain, every_output_alike, {}
    yield "each output by the loss's sensitivity", plain, by_sensitivity(bench), {}
    for rate in (0.01, 0.02, 0.05):
        yield f"Adam, learning rate {rate} (plain {plain.learning_rate})", change(learning_rate=rate), nothing, {}
    for rate in (0.01, 0.03):
        yield f"Muon, learning rate {rate}", change(learning_rate=rate), optimiser(Muon), {}
        yield f"schedule-free AdamW, learning rate {rate}", change(learning_rate=rate), optimiser(ScheduleFree), {}
    for batch in (256, 512, 2048):
        yield f"batches of {batch} tokens (plain {plain.batch_tokens})", change(batch_tokens=batch), nothing, {}
    for rate in (0.0003, 0.003, 0.01):
        name = f"phase 2, learning rate {rate} (plain {plain.end_to_end_learning_rate})"
        yield name, change(end_to_end_learning_rate=rate), nothing, {}
    yield "phase 2, learning rate found by trials", change(end_to_end_learning_rate=None), nothing, {}
    for weight in (0.1, 1.0):
        name = f"phase 2 on logits and hidden states, weight {weight:g}"
        yield name, plain, lambda weight=weight: hidden_states(weight), {}
    sampled = DistillationData(
        "self", **sample_from_model(DEMO, plain, bench.stream.config, "cpu", False, NoProgress())
    )
    yield "text sampled from the model (--data self)", plain, nothing, {"data": sampled}
    slowly = functools.partial(training, warm_up=0.1)
    yield "warm-up over 10 % of the steps (plain 3 %)", plain, slowly, {}
    for depth in (8, 16, 64, 128):
        yield f"depth {depth} (plain {plain.depth})", change(depth=depth), nothing, {}
    for depth in (64, 128):
        again = functools.partial(training, attempts=modulewise.ATTEMPTS)
        yield f"depth {depth}, diverged layers once more at half the rate", change(depth=depth), again, {}
        yield f"depth {depth}, warm-up over 10 % of the steps", change(depth=depth), slowly, {}
    today = LockConfig(**{name: getattr(plain, name) for name in ("tokens", "end_to_end_tokens", "validation_tokens")})
    today = today.model_copy(update={"coupling": plain.coupling})
    defaults = functools.partial(training, adam.WARM_UP_SHARE, modulewise.ATTEMPTS)
    yield "today's defaults, coupling raised over 50 %", today.model_copy(update={"ramp_share": 0.5}), defaults, {}
    for depth in (32, 64, 128):
        yield f"today's defaults, depth {depth}", today.model_copy(update={"depth": depth}), defaults, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--end-to-end-tokens", type=int, default=12_288)
    parser.add_argument("--coupling", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these; others in --out are kept")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON, after every row")
    arguments = parser.parse_args()
    plain = LockConfig(
        tokens=arguments.tokens,
        end_to_end_tokens=arguments.end_to_end_tokens,
        coupling=arguments.coupling,
        validation_tokens=4096,
        batch_tokens=1024,
        ramp_share=0.5,
        end_to_end_learning_rate=0.001,
    )
    bench = Bench(plain)
    rows = read_json(arguments.out, "--out")["rows"] if arguments.only and arguments.out else []
    for name, config, patch, more in rows_of(bench, plain):
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        row = {"name": name, "recipe": config.result_settings(), "git_hash": git_hash()}
        try:
            with training(), patch():
                row |= bench.lock(config, **({"data": bench.data} | more))
        except DistillationError as error:
            row |= {"error": str(error)}
        print(table([row]).splitlines()[-1], flush=True)
        rows = [other for other in rows if other["name"] != name] + [row]
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            head = {"schema": "lockkit-phases/1", "plain_recipe": plain.result_settings(), "versions": versions()}
            write_json(arguments.out, head | {"rows": rows})
    if arguments.out:
        lines = [
            "# What lowers the loss of a lock at equal tokens",
            f"`demo`, depth {plain.depth} unless a row says otherwise, coupling {plain.coupling:g}, {plain.tokens:,} tokens a "
            f"layer, {plain.end_to_end_tokens:,} end to end; measured on {plain.validation_tokens:,} tokens of the split "
            "`evaluate`; on a CPU. One seed each: differences in KL below about 3 % mean nothing. "
            "Made by `python tools/compare_phases.py`; figures and commits in the JSON beside this file.",
            table(rows),
        ]
        arguments.out.with_suffix(".md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| | mean NMSE | perplexity ratio, KL after phase 1 | after phase 2 |", "|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | diverged | | |")
            continue
        phases = [row[phase] for phase in ("phase_1", "phase_2")]
        figures = " | ".join(f"{phase['perplexity_ratio']:.4f}, {phase['kl_divergence']:.5f}" for phase in phases)
        lines.append(f"| {row['name']} | {row['nmse']:.4f} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
