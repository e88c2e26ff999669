"""Forward time, training time and memory of a lock against its depth.

    python tools/measure_asymmetry.py                          # a GPU if there is one, else the CPU
    python tools/measure_asymmetry.py --device cpu --shape qwen3-0.6b --depth 8 --depth 32 --tokens 128

It measures one MLP, and a stack of decoder layers (attention, norms and MLP, without embeddings and head). Weights are
random, because none of these figures depends on them.

1. Build the original, and its locked form at one depth after the other.
2. After a warm-up, measure the original and the lock in turns, `--rounds` times: seconds of a forward pass without
   gradients, and seconds of forward and backward pass with gradients of all weights and the input. Take medians.
3. Measure once: the bytes that autograd saves for the backward pass (each storage once, without the weights), and the
   peak of memory during forward and backward pass beyond weights, gradients and input. On a GPU the peak is the
   allocator's, on the CPU that of live tensors. With few tokens, the peak is not due to activations but to the
   gradient of one matrix before it is added to the sum.
4. Repeat this with the audit's memory savers (lockkit/attack/savers.py): reversal without and with anchors,
   and checkpointing of the MLP or of each decoder layer, which is also applied to the original.
5. Print ratios to the original without a saver *in the same turn*; write JSON, a table and a plot.

Results: `asymmetry-cpu.{json,md,svg}` or `asymmetry-cuda.*` in tools/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lockkit.attack import savers
from lockkit.attack.cost import LiveTensors, ProcessMemory, SavedTensors
from lockkit.devices import synchronise
from lockkit.dlr.net import DLRNet, block_ranks
from lockkit.version import git_hash

SCHEMA = "lockkit-asymmetry/1"
GAIN = 0.1  # with larger gains, the stream of a chain of random weights may overflow
# hidden size, MLP width, attention heads, key and value heads, head size
SHAPES = {
    "tiny": (64, 192, 4, 2, 16),
    "qwen3-0.6b": (1024, 3072, 16, 8, 128),
    "qwen3-8b": (4096, 12288, 32, 8, 128),
}
SUBJECTS = ("mlp", "layers")
SAVERS = {  # by their names in the audit
    "plain": "none",
    "reversal": "reversal",
    "reversal, anchors": "reversal-anchored",
    "checkpointing": "checkpoint-layers",
}
METRICS = {
    "forward_seconds": "forward time",
    "training_seconds": "forward and backward time",
    "saved_bytes": "saved bytes",
    "peak_bytes": "peak memory",
}


@dataclass(frozen=True)
class Row:
    """The figures of one variant of one subject. `ratios` are to the original without a saver in the same turn."""

    shape: str
    subject: str
    depth: int | None  # None: the original
    saver: str
    measured_with_depth: int  # depth of the lock that was measured in the same turns
    forward_seconds: float | None = None  # savers do not change it
    training_seconds: float = 0.0
    saved_bytes: int | None = None  # None for checkpointing: autograd does not save its inputs
    peak_bytes: int = 0
    ratios: dict[str, float] | None = None


class Stack(nn.Module):
    """A model whose layers are in `model.layers`, as the audit's savers expect of a causal language model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From `[batch, seq, hidden]` to the same shape."""
        return self.model(x) if isinstance(self.model, OneLayer) else self.model(inputs_embeds=x, use_cache=False)[0]


class OneLayer(nn.Module):
    """A model whose only layer is an MLP or a chain."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From `[batch, seq, hidden]` to the same shape."""
        return self.layers[0](x)


def build(subject: str, shape: str, depth: int | None, options: argparse.Namespace) -> Stack:
    """A subject of random weights. With a depth, its MLPs are replaced by chains."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3Model

    hidden, width, heads, kv_heads, head_size = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=8, hidden_size=hidden, intermediate_size=width, num_hidden_layers=options.layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_size, use_cache=False,
        max_position_embeddings=max(options.tokens, 32),
    )  # fmt: skip

    def chain() -> DLRNet:
        return DLRNet(hidden, block_ranks(width, depth), nn.SiLU(), gain=GAIN)

    torch.manual_seed(0)
    with torch.device(options.device):
        if subject == "mlp":
            model = OneLayer(Qwen3MLP(config) if depth is None else chain())
        else:
            model = Qwen3Model(config)
            model.embed_tokens = None
            for layer in model.layers if depth is not None else []:
                layer.mlp = chain()
    return Stack(model).to(getattr(torch, options.dtype)).train()


class Runner:
    """Runs timed or counted passes through one model."""

    def __init__(self, model: Stack, options: argparse.Namespace, hidden: int):
        self.model, self.device = model, torch.device(options.device)
        shape = (1, options.tokens, hidden)
        self.x = torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype), requires_grad=True)

    def output(self) -> torch.Tensor:
        """One forward pass, `[1, tokens, hidden]`."""
        return self.model(self.x)

    def train(self) -> None:
        """One forward and one backward pass. Gradients accumulate."""
        out = self.output()
        out.backward(torch.ones_like(out))

    def seconds(self, action: Callable[[], object]) -> float:
        """Wall-clock seconds of `action`."""
        synchronise(self.device)
        started = time.perf_counter()
        action()
        synchronise(self.device)
        return time.perf_counter() - started

    def saved_bytes(self) -> int:
        """Bytes that autograd saves in a forward pass."""
        with SavedTensors(self.model.parameters()) as saved:
            self.output()
        return saved.bytes

    def peak_bytes(self) -> int:
        """Peak of memory during forward and backward pass, in bytes beyond the memory in use before."""
        self.train()  # allocates the gradients, which exist in all steps but the first
        gc.collect()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            with ProcessMemory(self.device) as memory:
                self.train()
            return memory.allocated - before
        existing = [self.x, *self.model.parameters(), *self.model.buffers()]
        live = LiveTensors(self.device, [*existing, *(t.grad for t in existing if t.grad is not None)])
        before = live.bytes
        with live:
            self.train()
        return live.peak - before


def measure(shape: str, subject: str, depth: int, options: argparse.Namespace) -> list[Row]:
    """Measure the original and one lock in turns."""
    runners, variants = {}, []
    for kind, kind_depth in (("original", None), ("locked", depth)):
        runners[kind] = Runner(build(subject, shape, kind_depth, options), options, SHAPES[shape][0])
        variants += [
            (kind, saver, Row(shape, subject, kind_depth, saver, depth))
            for saver in SAVERS
            if kind == "locked" or not saver.startswith("reversal")
        ]
    forward: list[list[float]] = [[] for _ in variants]
    training: list[list[float]] = [[] for _ in variants]
    for turn in range(options.warm_up + options.rounds):
        for index, (kind, saver, _) in enumerate(variants):
            runner = runners[kind]
            with savers.saver(SAVERS[saver], runner.model):
                seconds = runner.seconds(runner.train)
            if turn >= options.warm_up:
                training[index].append(seconds)
            if saver == "plain":
                with torch.no_grad():
                    seconds = runner.seconds(runner.output)
                if turn >= options.warm_up:
                    forward[index].append(seconds)
    rows = []
    for index, (kind, saver, row) in enumerate(variants):
        with savers.saver(SAVERS[saver], runners[kind].model):
            row = replace(
                row,
                forward_seconds=statistics.median(forward[index]) if forward[index] else None,
                training_seconds=statistics.median(training[index]),
                saved_bytes=None if saver == "checkpointing" else runners[kind].saved_bytes(),
                peak_bytes=runners[kind].peak_bytes(),
            )
        rows.append(row)
    return [replace(row, ratios=_ratios(row, rows[0])) for row in rows]


def _ratios(row: Row, original: Row) -> dict[str, float]:
    return {name: getattr(row, name) / getattr(original, name) for name in METRICS if getattr(row, name) is not None}


def describe(options: argparse.Namespace) -> dict:
    """How the figures were made, without host names and paths."""
    machine = {"cores": os.cpu_count(), "processor": _processor(), "torch_threads": torch.get_num_threads()}
    if options.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "schema": SCHEMA,
        "commit": git_hash(),
        "command": shlex.join(["python", "tools/measure_asymmetry.py", *options.arguments]),
        "machine": machine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": {
            name: getattr(options, name) for name in ("device", "dtype", "tokens", "layers", "rounds", "warm_up")
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown(result: dict) -> str:
    """The table, below a paragraph on the settings and the machine."""
    machine, settings = result["machine"], result["settings"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    layers = settings["layers"]
    lines = [
        "# What depth costs: locked over original",
        "",
        f"{where}, {machine['torch_threads']} thread(s), torch {result['torch']}, {settings['dtype']}, "
        f"{settings['tokens']} tokens, commit {result['commit']}. Random weights. `mlp` is one MLP, `layers` is "
        f"{layers} decoder layer{'s' if layers > 1 else ''} without embeddings and head"
        + ("" if "gpu" in machine else " (reduced: this is a CPU)")
        + f". Medians of {settings['rounds']} rounds, taken in turns with the original. Every figure is a ratio to the "
        "original under plain autograd. Checkpointing has no saved bytes, because autograd does not save its inputs; its "
        "peak includes them.",
        "",
        f"    {result['command']}",
        "",
        "| shape | what | depth | backward by | " + " | ".join(METRICS.values()) + " |",
        "|---|---|---:|---|" + "---:|" * len(METRICS),
    ]
    seen = set()
    for row in result["rows"]:
        key = (row["shape"], row["subject"], row["depth"], row["saver"])
        if key in seen or (row["depth"] is None and row["saver"] == "plain"):
            continue  # the original is once in the table for each shape; JSON has all of its turns
        seen.add(key)
        ratios = [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in METRICS]
        depth = "original" if row["depth"] is None else row["depth"]
        lines.append(f"| {row['shape']} | {row['subject']} | {depth} | {row['saver']} | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Plot ratios against depth: one row of panels per shape and subject, one column per figure."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["shape"], row["subject"]) for row in result["rows"]))
    size = (3.4 * len(METRICS), 2.7 * len(panels) + 0.5)
    figure, axes = pyplot.subplots(len(panels), len(METRICS), figsize=size, squeeze=False, layout="constrained")
    for line, (shape, subject) in zip(axes, panels, strict=True):
        for panel, (metric, label) in zip(line, METRICS.items(), strict=True):
            for saver in SAVERS:
                points = sorted(
                    (row["depth"], row["ratios"][metric])
                    for row in result["rows"]
                    if (row["shape"], row["subject"], row["saver"]) == (shape, subject, saver)
                    and row["depth"] is not None
                    and metric in row["ratios"]
                )
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=saver)
            panel.axhline(1, color="0.6", linewidth=1)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set_ylim(bottom=0)
            panel.set_title(f"{shape}, {subject}: {label}", fontsize=9)
            panel.set_xlabel("depth", fontsize=8)
            panel.tick_params(labelsize=8)
        line[0].set_ylabel("locked over original", fontsize=8)
    axes[0][1].legend(fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "lockkit"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. Some defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape",
        action="append",
        choices=SHAPES,
        help="default: both Qwen3 shapes, qwen3-0.6b alone on the CPU; repeat for more",
    )
    parser.add_argument("--subject", action="append", choices=SUBJECTS, help="default: both")
    parser.add_argument("--depth", action="append", type=int, help="default: 8 16 32 64 128")
    parser.add_argument("--tokens", type=int, help="tokens per pass; default: 4096 on a GPU, 512 on the CPU")
    parser.add_argument("--layers", type=int, help="layers of the stack; default: 4 on a GPU, 1 on the CPU")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on the CPU"
    )
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 5 on the CPU")
    parser.add_argument("--warm-up", type=int, help="rounds that are not counted; default: 3 on a GPU, 1 on the CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    defaults = {"tokens": (4096, 512), "layers": (4, 1), "dtype": ("bfloat16", "float32"), "rounds": (20, 5)}
    for name, (gpu, cpu) in (defaults | {"warm_up": (3, 1)}).items():
        if getattr(options, name) is None:
            setattr(options, name, gpu if on_gpu else cpu)
    options.shape = options.shape or ["qwen3-0.6b", "qwen3-8b"][: 2 if on_gpu else 1]
    options.subject = options.subject or list(SUBJECTS)
    options.depth = sorted(set(options.depth or [8, 16, 32, 64, 128]))
    for name in ("tokens", "layers", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    narrowest = min(SHAPES[shape][1] for shape in options.shape)
    if not 1 <= options.depth[0] <= options.depth[-1] <= narrowest:
        parser.error(f"--depth must be between 1 and the narrowest MLP's width, {narrowest}")
    options.arguments = arguments
    return options


def main(arguments: list[str]) -> None:
    """Measure, and write JSON, table and plot."""
    options = parse(arguments)
    rows: list[Row] = []
    for shape in options.shape:
        for subject in options.subject:
            for depth in options.depth:
                rows += measure(shape, subject, depth, options)
                locked = next(row for row in rows[::-1] if row.saver == "plain")
                figures = ", ".join(f"{METRICS[name]} {value:.2f}x" for name, value in locked.ratios.items())
                print(f"{shape} {subject} depth {depth}: {figures}", flush=True)
                gc.collect()
                if options.device.startswith("cuda"):
                    torch.cuda.empty_cache()
    result = describe(options) | {"rows": [asdict(row) for row in rows]}
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.out / f"asymmetry-{options.device.split(':')[0]}"
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    name.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        plot(result, name.with_suffix(".svg"))
    print(f"written: {name.name}.json and .md" + (", and .svg" if drawn else "; for a plot, install matplotlib"))


if __name__ == "__main__":
    main(sys.argv[1:])
