"""Speed of phase 1: lockkit's training of chains compared with a plain loop over layers.

    python tools/benchmark_lock.py --out tools/results/lock-speed-cpu.json

Every method takes the same optimiser steps on the same tokens, in turns, for several rounds. Each round gives one
ratio per method. The median of the rounds and their range are printed. The methods:

    plain       a DLRNet of nn.Linear modules per layer, autograd, AdamW over its matrices
    packed      lockkit/lock/packed.py, one layer at a time (--layers-together 1)
    packed xG   the same, G layers in one batched computation
    packed, all, bf16    all layers in one batched computation, products in bfloat16 (on a GPU)
    packed x1, compiled  one layer at a time with torch.compile (--compile)

The share of peak is the rate of floating-point operations of a training step (forward and backward pass of the
chains), over that of the machine's own matrix product in the method's number format: of 2048 x 2048, on a GPU of
8192 x 8192.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from lockkit.dlr.cost import mlp_parameters
from lockkit.dlr.mlp import MLPShape, chains_for
from lockkit.files import write_json
from lockkit.lock.packed import PackedChains
from lockkit.measure.metrics import nmse
from lockkit.version import git_hash, versions

SHAPES = {"demo": (256, 768, 4), "gemma3-270m": (640, 2048, 4), "qwen3-0.6b": (1024, 3072, 8)}


class Setting:
    """Inputs and targets, `[layers, tokens, hidden]`, for the chains of several layers of one shape."""

    def __init__(self, shape: MLPShape, depth: int, layers: int, tokens: int, device: str):
        self.shape, self.depth, self.layers, self.tokens, self.device = shape, depth, layers, tokens, device
        generator = torch.Generator().manual_seed(0)
        size = (layers, tokens, shape.hidden_size)
        self.x = torch.randn(size, generator=generator).to(device)
        self.y = torch.randn(size, generator=generator).to(device)

    def chains(self, count: int) -> list:
        """`count` chains of random weights, the same at every call."""
        torch.manual_seed(0)
        chains = chains_for(self.shape, self.depth, "silu")
        sizes = self.shape.hidden_size, self.shape.intermediate_size
        return [chains.empty_chain(*sizes, F.silu, 0.1).to(self.device) for _ in range(count)]

    def flops(self) -> float:
        """Floating-point operations of one step of all layers: per weight and token, 2 forward and 4 backward."""
        return 6 * mlp_parameters(self.shape) * self.tokens * self.layers


def plain(setting: Setting) -> Callable[[], None]:
    """A step of all layers, one after the other, with modules, autograd and AdamW."""
    chains = setting.chains(setting.layers)
    optimisers = [torch.optim.AdamW(chain.parameters(), lr=1e-4, weight_decay=0.0) for chain in chains]

    def step() -> None:
        for chain, optimiser, x, y in zip(chains, optimisers, setting.x, setting.y, strict=True):
            nmse(chain(x), y).backward()
            optimiser.step()
            optimiser.zero_grad()

    return step


def packed(setting: Setting, together: int, dtype: torch.dtype | None = None, compiled: bool = False) -> Callable:
    """A step of all layers, `together` of them in one computation. Matrix products are in `dtype`."""
    groups = [PackedChains(setting.chains(together)) for _ in range(setting.layers // together)]
    optimisers = [torch.optim.AdamW(group.parameters(), lr=1e-4, weight_decay=0.0, fused=True) for group in groups]
    runs = [torch.compile(group) if compiled else group for group in groups]

    def step() -> None:
        parts = zip(runs, optimisers, setting.x.split(together), setting.y.split(together), strict=True)
        for run, optimiser, x, y in parts:
            nmse(run(x, dtype=dtype), y).sum().backward()
            optimiser.step()
            optimiser.zero_grad()

    return step


def seconds_of(step: Callable, device: str) -> float:
    """Wall-clock seconds of one call of `step`."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product on this machine."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = min(seconds_of(lambda: a @ a, device) for _ in range(8))
    return 2 * size**3 / best


def dtype_of(name: str) -> torch.dtype:
    """The number format of a method's matrix products."""
    return torch.bfloat16 if name.endswith("bf16") else torch.float32


def methods(setting: Setting, compiled: bool) -> dict[str, Callable[[], None]]:
    """The steps to compare, by name; `compiled` adds torch.compile."""
    found = {"plain loop": plain(setting)}
    for together in (1, 2, 4, 8):
        if setting.layers % together == 0:
            found[f"packed x{together}"] = packed(setting, together)
    if setting.device == "cuda":
        found["packed, all, bf16"] = packed(setting, setting.layers, torch.bfloat16)
    if compiled:
        found["packed x1, compiled"] = packed(setting, 1, compiled=True)
    return found


def measure(setting: Setting, steps: dict[str, Callable[[], None]], rounds: int) -> list[dict]:
    """Time the steps in turns, after one step of each as a warm-up; return one row of figures for each."""
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(seconds_of(step, setting.device))
    peaks = {dtype: peak_flops(setting.device, dtype) for dtype in {dtype_of(name) for name in steps}}
    rows = []
    for name, seconds in taken.items():
        ratios = sorted(a / b for a, b in zip(taken["plain loop"], seconds, strict=True))
        median = statistics.median(seconds)
        rows.append(
            {
                "way": name,
                "speed_over_plain": statistics.median(ratios),
                "range": [ratios[0], ratios[-1]],
                "layer_tokens_per_second": setting.tokens * setting.layers / median,
                "share_of_peak": setting.flops() / median / peaks[dtype_of(name)],
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = ["| method | speed over the plain loop's: median (range) | tokens/s per layer | share of peak |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        low, high = row["range"]
        lines.append(
            f"| {row['way']} | {row['speed_over_plain']:.2f} ({low:.2f} - {high:.2f}) | "
            f"{row['layer_tokens_per_second']:,.0f} | {row['share_of_peak']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Time all methods; write the figures to `--out`, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per step; 512 is the default of `lockkit lock`")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, intermediate, layers = SHAPES[arguments.shape]
    setting = Setting(MLPShape(hidden, intermediate), arguments.depth, layers, arguments.tokens, device)
    rows = measure(setting, methods(setting, arguments.compile), arguments.rounds)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "schema": "lockkit-lock-speed/1",
            "command": shlex.join(["python", *sys.argv]),
            "machine": {
                "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "git_hash": git_hash(),
            "versions": versions(),
            "settings": {
                "shape": arguments.shape,
                "layers": layers,
                "depth": arguments.depth,
                "tokens": arguments.tokens,
            },
            "rows": rows,
        }
        write_json(arguments.out, record)
    print(markdown(rows))


if __name__ == "__main__":
    main()
