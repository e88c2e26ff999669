"""Undoing a chain in closed form: from unlabelled activations, without gradients or a backward pass.

A chain is cut into K stages of consecutive blocks. Each stage becomes one block (K = 1: an ordinary MLP). For one
stage after the other:

1. Compute its input `t = x + gain * s`, where `s` is the stream of the stages solved so far.
2. First layer, one of: the chain's own rows side by side (*stacked*); a ridge regression of the
   true pre-activations on `t` (*linearised*); noise (*random*, a control that uses none of the chain's weights).
3. Second layer: a ridge regression of the residual (the true stream at the end of the stage minus `s`) on the units.

*Corrected*: both layers start from the chain's own weights, and the regressions fit the remaining errors. The ridge
then shrinks towards the lock and not towards 0, so a few hundred tokens are enough. With no tokens at all
(`side_by_side` alone) the dependence of blocks on each other is ignored.

Gram matrices are summed over tokens in float64. Every ridge is chosen on held-out activations.
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
RIDGES_OF_CORRECTIONS = (*RIDGES, 1.0, 10.0, 100.0)  # with the largest, almost no correction is left
HELD_OUT_SHARE = 8  # one chunk of this many is held out
CHUNK = 2048  # tokens

FirstLayer = Literal["stacked", "linearised", "random", "corrected"]


class Ridge:
    """The regression `y = A w (+ c)`, from chunks of tokens. The ridge with the lowest held-out error is chosen.

    Args:
        intercept: fit the constant `c`.
        ridges: candidates, as multiples of the mean of the Gram matrix' diagonal.
    """

    def __init__(self, intercept: bool, ridges: tuple[float, ...] = RIDGES):
        self.intercept, self.ridges = intercept, ridges
        self.sums: dict[bool, list[torch.Tensor]] = {}

    def add(self, a: torch.Tensor, y: torch.Tensor, held_out: bool) -> None:
        """Add a chunk: `a`, `[tokens, inputs]`, and `y`, `[tokens, outputs]`."""
        if self.intercept:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        new = [(a.T @ a).double(), (a.T @ y).double(), y.double().square().sum()]
        old = self.sums.get(held_out)
        self.sums[held_out] = new if old is None else [o + n for o, n in zip(old, new, strict=True)]

    def solve(self) -> tuple[torch.Tensor, torch.Tensor | None, float, float]:
        """Solve for the weights. At least one chunk must be held out and one not.

        Returns:
            Weights, `[outputs, inputs]`; the intercept, `[outputs]`, or None; the ridge; and the held-out sum of squared
            errors over that of the targets.
        """
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
        assert best is not None, "there is at least one ridge"
        w = best[2].float()
        if self.intercept:
            return w[:-1].T.contiguous(), w[-1].contiguous(), best[1], best[0]
        return w.T.contiguous(), None, best[1], best[0]


@dataclass(frozen=True)
class Stage:
    """One solved stage: its weights, the ridge of its second layer, and that regression's held-out error."""

    weights: MLPWeights
    ridge: float
    error: float  # see `Ridge.solve`


def _chunks(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield chunks of `x`, `[tokens, hidden]`, and whether each is held out."""
    for index, part in enumerate(x.split(max(1, min(CHUNK, len(x) // HELD_OUT_SHARE)))):
        yield part, index % HELD_OUT_SHARE == HELD_OUT_SHARE - 1


def _trace(chain: DLRNet, x: torch.Tensor, first: int, last: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The true pre-activations of blocks `[first, last)`, gate and up (or up alone), and the stream after them."""
    before: list[list[torch.Tensor]] = []
    for index, step in enumerate(itertools.islice(walk(chain, x), last)):
        if index >= first:
            before.append(step.before)
    return [torch.cat(parts, 1) for parts in zip(*before, strict=True)], step.stream


def _stream_of(stages: list[Stage], x: torch.Tensor, chain: DLRNet) -> torch.Tensor:
    """The stream after the solved stages, `[tokens, hidden]`."""
    stream = torch.zeros_like(x)
    for stage in stages:
        units = stage.weights.units(chain.block_input(x, stream), chain.activation)
        stream = stream + units @ stage.weights.down.T
    return stream


def _random(like: MLPWeights, x: torch.Tensor, seed: int) -> MLPWeights:
    """Noise in place of the first layer, scaled so that pre-activations on `x` have about unit variance; zero biases."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / x[:CHUNK].float().norm(dim=-1).mean().item()

    def noise(matrix: torch.Tensor) -> torch.Tensor:
        return (torch.randn(matrix.shape, generator=generator) * scale).to(matrix.device)

    def zeros(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else torch.zeros_like(bias)

    up = noise(like.up)
    gate = None if like.gate is None else noise(like.gate)
    return MLPWeights(up, like.down, gate, zeros(like.up_bias), zeros(like.gate_bias))


@torch.no_grad()
def collapse(
    chain: DLRNet, x: torch.Tensor, bounds: list[tuple[int, int]], first_layer: FirstLayer, seed: int = 0
) -> list[Stage]:
    """Solve a chain for fewer blocks, see the top of this file.

    Args:
        x: inputs of the chain, `[tokens, hidden]`.
        bounds: blocks `[first, last)` of each stage, see `rebuild.stage_bounds`.
        first_layer: source of the first layer of each stage.
        seed: seed of the noise, if `first_layer` is `random`.

    Returns:
        The stages in order. The last one carries the output bias, if the chain has one.
    """
    device = next(chain.parameters()).device
    stages: list[Stage] = []
    for number, (first, last) in enumerate(bounds):
        weights, corrected = side_by_side(chain, first, last), first_layer == "corrected"
        if first_layer in ("linearised", "corrected"):
            _linearise(weights, chain, x, stages, first, last, corrected)
        elif first_layer == "random":
            weights = _random(weights, x, seed * len(bounds) + number)
        bias = chain.output_bias if number == len(bounds) - 1 else None
        second = Ridge(bias is not None, RIDGES_OF_CORRECTIONS if corrected else RIDGES)
        for part, held_out in _chunks(x):
            part = part.to(device)
            stream = _stream_of(stages, part, chain)
            units = weights.units(chain.block_input(part, stream), chain.activation)
            target = _trace(chain, part, first, last)[1] - stream
            if corrected:
                target = target - units @ weights.down.T
            elif bias is not None:
                target = target + bias
            second.add(units, target, held_out)
        down, down_bias, ridge, error = second.solve()
        weights.down = weights.down + down if corrected else down
        weights.down_bias = bias + down_bias if corrected and bias is not None and down_bias is not None else down_bias
        stages.append(Stage(weights, ridge, error))
    return stages


def _linearise(
    weights: MLPWeights, chain: DLRNet, x: torch.Tensor, stages: list[Stage], first: int, last: int, corrected: bool
) -> None:
    """Replace the first layer in `weights` by the regression of the pre-activations of blocks `[first, last)`.

    If `corrected`, the regression of the remaining error is added to the first layer instead.
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
        part_rows = slice(index * width, (index + 1) * width)
        setattr(weights, name, row + both[part_rows] if corrected else both[part_rows])
        if intercept is not None:
            fitted = intercept[part_rows]
            setattr(weights, f"{name}_bias", offset + fitted if corrected else fitted)
