"""Undoing a chain in closed form: no gradient, no backward pass, unlabelled activations only.

For one chain cut into K stages (K = 1: an ordinary MLP), stage by stage:

1. `t = x + gain * s`, with `s` the stream that the stages solved so far make.
2. First layer of the stage: the chain's own rows side by side (*stacked*), a ridge regression of the
   true pre-activations on `t` (*linearised*), or noise (*random*: what a solution gives that knows
   nothing of the chain's weights).
3. Second layer: a ridge regression of what is missing (true stream at the stage's end minus `s`)
   on the units.

*Corrected*: both layers start as the chain's own, and the regressions are of what these leave, so that a ridge
shrinks towards the lock and not towards nothing. A few hundred tokens are enough then; with none at all
(`side_by_side` alone) the coupling is ignored.

Gram matrices are added up over tokens in float64; every ridge is chosen on held-out activations.
Source: this project's first measurements of the lock (ridge regression: Hoerl and Kennard 1970;
random features: Rahimi and Recht 2007).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import side_by_side, walk

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean of the Gram matrix' diagonal
RIDGES_OF_CORRECTIONS = (*RIDGES, 1.0, 10.0, 100.0)  # the last leave next to nothing of a correction
HELD_OUT_SHARE = 8  # one part in
CHUNK = 2048  # tokens at a time

FirstLayer = Literal["stacked", "linearised", "random", "corrected"]


class Ridge:
    """Regression `y = A w (+ c)` from chunks; the ridge is the one that predicts held-out chunks best."""

    def __init__(self, intercept: bool, ridges: tuple[float, ...] = RIDGES):
        self.intercept, self.ridges = intercept, ridges
        self.sums: dict[bool, list[torch.Tensor]] = {}

    def add(self, a: torch.Tensor, y: torch.Tensor, held_out: bool) -> None:
        """Add `a` [tokens, inputs] and `y` [tokens, outputs]."""
        if self.intercept:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        new = [(a.T @ a).double(), (a.T @ y).double(), y.double().square().sum()]
        old = self.sums.get(held_out)
        self.sums[held_out] = new if old is None else [o + n for o, n in zip(old, new, strict=True)]

    def solve(self) -> tuple[torch.Tensor, torch.Tensor | None, float, float]:
        """Weights `[outputs, inputs]`, intercept, the ridge, and the held-out error over the targets' energy."""
        gram, cross, _ = self.sums[False]
        held_gram, held_cross, energy = self.sums[True]
        values, vectors = torch.linalg.eigh(gram)
        rotated = vectors.T @ cross
        best: tuple[float, float, torch.Tensor] | None = None
        for ridge in self.ridges:
            shift = ridge * gram.diagonal().mean()
            w = vectors @ (rotated / (values.clamp_min(0) + shift)[:, None])
            error = (energy - 2 * (w * held_cross).sum() + (w * (held_gram @ w)).sum()) / energy
            if best is None or error.item() < best[0]:
                best = (error.item(), ridge, w)
        w = best[2].float()
        if self.intercept:
            return w[:-1].T.contiguous(), w[-1].contiguous(), best[1], best[0]
        return w.T.contiguous(), None, best[1], best[0]


@dataclass(frozen=True)
class Stage:
    """One solved stage and how well it fits."""

    weights: MLPWeights
    ridge: float
    error: float


def _chunks(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
    for index, part in enumerate(x.split(max(1, min(CHUNK, len(x) // HELD_OUT_SHARE)))):
        yield part, index % HELD_OUT_SHARE == HELD_OUT_SHARE - 1


def _trace(chain: DLRNet, x: torch.Tensor, first: int, last: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """True pre-activations of blocks `[first, last)`, gate and up (or up alone), and the stream after them."""
    before: list[list[torch.Tensor]] = []
    for index, step in enumerate(itertools.islice(walk(chain, x), last)):
        if index >= first:
            before.append(step.before)
    return [torch.cat(parts, 1) for parts in zip(*before, strict=True)], step.stream


def _stream_of(stages: list[Stage], x: torch.Tensor, chain: DLRNet) -> torch.Tensor:
    stream = torch.zeros_like(x)
    for stage in stages:
        units = stage.weights.units(chain.block_input(x, stream), chain.activation)
        stream = stream + units @ stage.weights.down.T
    return stream


def _random(like: MLPWeights, x: torch.Tensor, seed: int) -> MLPWeights:
    """Rows of noise that make pre-activations of about unit size on `x`; biases of zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / x[:CHUNK].float().norm(dim=-1).mean().item()

    def noise(matrix: torch.Tensor | None) -> torch.Tensor | None:
        return None if matrix is None else (torch.randn(matrix.shape, generator=generator) * scale).to(matrix.device)

    def zeros(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else torch.zeros_like(bias)

    return MLPWeights(noise(like.up), like.down, noise(like.gate), zeros(like.up_bias), zeros(like.gate_bias))


@torch.no_grad()
def collapse(
    chain: DLRNet, x: torch.Tensor, bounds: list[tuple[int, int]], first_layer: FirstLayer, seed: int = 0
) -> list[Stage]:
    """Solve a chain for fewer blocks.

    Args:
        x: inputs of the chain, `[tokens, hidden]`.
        bounds: blocks of each stage, see `rebuild.stage_bounds`.
        first_layer: where a stage's first layer comes from.
        seed: of the noise, if it is `random`.
    """
    device = next(chain.parameters()).device
    stages: list[Stage] = []
    for number, (first, last) in enumerate(bounds):
        weights, corrected = side_by_side(chain, first, last), first_layer == "corrected"
        if first_layer in ("linearised", "corrected"):
            _linearise(weights, chain, x, stages, first, last, corrected)
        elif first_layer == "random":
            weights = _random(weights, x, seed * len(bounds) + number)
        final = number == len(bounds) - 1 and chain.output_bias is not None
        second = Ridge(final, RIDGES_OF_CORRECTIONS if corrected else RIDGES)
        for part, held_out in _chunks(x):
            part = part.to(device)
            stream = _stream_of(stages, part, chain)
            units = weights.units(chain.block_input(part, stream), chain.activation)
            target = _trace(chain, part, first, last)[1] - stream
            if corrected:
                target = target - units @ weights.down.T
            elif final:
                target = target + chain.output_bias
            second.add(units, target, held_out)
        down, down_bias, ridge, error = second.solve()
        weights.down = weights.down + down if corrected else down
        weights.down_bias = chain.output_bias + down_bias if corrected and final else down_bias
        stages.append(Stage(weights, ridge, error))
    return stages


def _linearise(
    weights: MLPWeights, chain: DLRNet, x: torch.Tensor, stages: list[Stage], first: int, last: int, corrected: bool
) -> None:
    """Put the regression of the pre-activations of blocks `[first, last)` into `weights`.

    If `corrected`, the rows that are there get the regression of what they leave.
    """
    device, bias = next(chain.parameters()).device, weights.up_bias is not None
    rows = Ridge(bias, RIDGES_OF_CORRECTIONS if corrected else RIDGES)
    names = ["up"] if weights.gate is None else ["gate", "up"]
    own = [(getattr(weights, name), getattr(weights, f"{name}_bias")) for name in names]
    for part, held_out in _chunks(x):
        part = part.to(device)
        t = chain.block_input(part, _stream_of(stages, part, chain))
        target = torch.cat(_trace(chain, part, first, last)[0], 1)
        if corrected:
            target = target - torch.cat(weights.pre_activations(t), 1)
        rows.add(t, target, held_out)
    both, intercept, _, _ = rows.solve()
    width = len(weights.up)
    for index, (name, (row, offset)) in enumerate(zip(names, own, strict=True)):
        mine = slice(index * width, (index + 1) * width)
        setattr(weights, name, row + both[mine] if corrected else both[mine])
        if bias:
            setattr(weights, f"{name}_bias", offset + intercept[mine] if corrected else intercept[mine])
