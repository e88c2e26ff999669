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
(`as_they_stand`) the coupling is ignored.

Gram matrices are added up over tokens in float64; every ridge is chosen on held-out activations.
Source: this project's first measurements of the lock (ridge regression: Hoerl and Kennard 1970;
random features: Rahimi and Recht 2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lockkit.dlr.net import DLRNet
from lockkit.models.families import MLPWeights

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


def _trace(
    chain: DLRNet, x: torch.Tensor, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """True pre-activations (up, gate) of blocks `[first, last)`, and the stream after them."""
    stream, ups, gates = torch.zeros_like(x), [], []
    for index, block in enumerate(chain.blocks[:last]):
        t = torch.add(x, stream, alpha=chain.gain)
        if index >= first:
            ups.append(block.up_proj(t))
            if block.gate_proj is not None:
                gates.append(block.gate_proj(t))
        stream = stream + block(t, chain.activation)
    return torch.cat(ups, 1), torch.cat(gates, 1) if gates else None, stream


def units_of(weights: MLPWeights, t: torch.Tensor, activation) -> torch.Tensor:
    """The hidden units of an MLP, `[..., intermediate]`."""
    up = nn.functional.linear(t, weights.up, weights.up_bias)
    if weights.gate is None:
        return activation(up)
    return activation(nn.functional.linear(t, weights.gate, weights.gate_bias)) * up


def stacked(chain: DLRNet, first: int, last: int) -> MLPWeights:
    """Blocks `[first, last)` side by side as one MLP; differentiable."""
    blocks = chain.blocks[first:last]

    def together(name: str, part: str):
        values = [getattr(getattr(b, name), part) for b in blocks if getattr(b, name) is not None]
        return torch.cat(values) if values and values[0] is not None else None

    return MLPWeights(
        up=together("up_proj", "weight"),
        down=torch.cat([b.down_proj.weight for b in blocks], 1),
        gate=together("gate_proj", "weight"),
        up_bias=together("up_proj", "bias"),
        gate_bias=together("gate_proj", "bias"),
    )


def _stream_of(stages: list[Stage], x: torch.Tensor, chain: DLRNet) -> torch.Tensor:
    stream = torch.zeros_like(x)
    for stage in stages:
        units = units_of(stage.weights, torch.add(x, stream, alpha=chain.gain), chain.activation)
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


def as_they_stand(chain: DLRNet) -> MLPWeights:
    """All blocks side by side as one MLP, nothing solved for: exact where blocks do not depend on each other."""
    weights = stacked(chain, 0, len(chain.blocks))
    weights.down_bias = chain.output_bias
    return weights


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
        weights, corrected = stacked(chain, first, last), first_layer == "corrected"
        if first_layer in ("linearised", "corrected"):
            _linearise(weights, chain, x, stages, first, last, corrected)
        elif first_layer == "random":
            weights = _random(weights, x, seed * len(bounds) + number)
        final = number == len(bounds) - 1 and chain.output_bias is not None
        second = Ridge(final, RIDGES_OF_CORRECTIONS if corrected else RIDGES)
        for part, held_out in _chunks(x):
            part = part.to(device)
            stream = _stream_of(stages, part, chain)
            units = units_of(weights, torch.add(part, stream, alpha=chain.gain), chain.activation)
            target = _trace(chain, part, first, last)[2] - stream
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
    names = ["up"] if weights.gate is None else ["up", "gate"]
    own = [(getattr(weights, name), getattr(weights, f"{name}_bias")) for name in names]
    for part, held_out in _chunks(x):
        part = part.to(device)
        up, gate, _ = _trace(chain, part, first, last)
        t = torch.add(part, _stream_of(stages, part, chain), alpha=chain.gain)
        target = up if gate is None else torch.cat([up, gate], 1)
        if corrected:
            target = target - torch.cat([nn.functional.linear(t, *pair) for pair in own], 1)
        rows.add(t, target, held_out)
    both, intercept, _, _ = rows.solve()
    width = len(weights.up)
    for index, (name, (row, offset)) in enumerate(zip(names, own, strict=True)):
        mine = slice(index * width, (index + 1) * width)
        setattr(weights, name, row + both[mine] if corrected else both[mine])
        if bias:
            setattr(weights, f"{name}_bias", offset + intercept[mine] if corrected else intercept[mine])
