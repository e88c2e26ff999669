"""Distillation that knows the closed-form attacks (phase 2, `--hardening`).

`lockkit attack` turns a chain into an ordinary MLP without training: its first layer is the chain's rows side by
side (*stacked*) or the regression of all pre-activations on the chain's input (*linearised*), its second a ridge
regression of the chain's output. Here both attackers take part in every step:

1. Solve each attacker for each layer, from Gram matrices that are running averages over the batches.
2. Run the model that each attacker ends up with, all chains replaced, on the batch.
3. Add `weight * max(0, cap - KL(teacher || attacked))` to the loss: an attacked model shall be no better than
   `cap` nats. Above it an attacker is not pushed further.
4. The gradient reaches the chains through the attackers' rows and through what they solved for. A solution `w` of
   `A'A w = A'y` moves by `(A'A)^-1 (dA'(y - A w) + A'(dy - dA w))` (implicit differentiation), of which the batch
   at hand gives an estimate.

Source: the idea is adversarial training against the best response of an attacker (Tramer and Boneh 2019; for
fine-tuning: Henderson et al. 2023, "Self-destructing models"); the attackers are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lockkit.lock.packed import Activation, PackedChains
from lockkit.lock.workers import Workers

if TYPE_CHECKING:
    from lockkit.lock.config import LockConfig

ATTACKERS = ("stacked", "linearised")
MEMORY = 0.97  # of the running averages: about 30 batches
FIRST_SHARE, FULL_SHARE = 0.05, 0.2  # of the steps: attackers only watch before the first, weigh in full after the second
GRADIENT_RIDGE = 1e-2  # a batch says little about weak directions
ROWS_RIDGE, UNITS_RIDGE = 1e-5, 1e-4  # times the mean of the Gram matrix' diagonal


class AttackedMLP(nn.Module):
    """The MLP that an attacker makes of a chain: `[..., hidden]` to `[..., hidden]`; not trained itself."""

    def __init__(self, rows: torch.Tensor, solved: torch.Tensor, chain: PackedChains):
        super().__init__()
        self.rows, self.solved, self.chain_form = rows, solved, _Form.of(chain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain_form.units(x, self.rows) @ self.solved


@dataclass(frozen=True)
class _Form:
    """How units follow from pre-activations, for all blocks side by side."""

    depth: int
    gated: bool
    bias: bool
    output_bias: bool
    activation: Activation

    @classmethod
    def of(cls, chain: PackedChains) -> _Form:
        return cls(
            len(chain.ranks), chain.gated, chain.read_bias is not None, chain.output_bias is not None, chain.activation
        )

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        return _with_one(x) if self.bias else x

    def units(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Units `[..., intermediate]` of an MLP with first layer `rows`, a one added for the output's bias."""
        before = (self.inputs(x) @ rows).unflatten(-1, (self.depth, -1))
        if self.gated:
            gate, up = before.chunk(2, -1)
            units = self.activation(gate) * up
        else:
            units = self.activation(before)
        units = units.flatten(-2)
        return _with_one(units) if self.output_bias else units


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


@dataclass(frozen=True)
class Seen:
    """What a chain did on a batch: `x` and `y` `[tokens, hidden]`, `before` `[tokens, rows]`."""

    x: torch.Tensor
    before: torch.Tensor
    y: torch.Tensor

    def first(self, share: float) -> Seen:
        """The first part of the tokens."""
        tokens = round(share * len(self.x))
        return Seen(self.x[:tokens], self.before[:tokens], self.y[:tokens])

    @classmethod
    def of(cls, x: torch.Tensor, units_in: torch.Tensor, y: torch.Tensor) -> Seen:
        """From `PackedChains.outputs_and_units` for a group of one."""
        before = units_in[:, 0].transpose(0, 1).flatten(1).to(x.dtype)
        return cls(x.flatten(0, -2), before, y.flatten(0, -2))


class LayerAttackers:
    """Both attackers of one chain, with their running averages."""

    def __init__(self, gradient_ridge: float = GRADIENT_RIDGE) -> None:
        self.gradient_ridge = gradient_ridge
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def observe(self, chain: PackedChains, seen: Seen, workers: Workers) -> None:
        """Take a batch into the averages, and solve both attackers anew."""
        form, x = _Form.of(chain), _Form.of(chain).inputs(seen.x)
        self._average({"xx": x.T @ x, "xz": x.T @ seen.before}, len(x), workers)
        self.averages["linearised.rows"] = _ridge(self.averages["xx"], self.averages["xz"], ROWS_RIDGE)
        sums = {}
        for name in ATTACKERS:
            units = form.units(seen.x, self._rows(name, chain))
            sums |= {f"{name}.aa": units.T @ units, f"{name}.ay": units.T @ seen.y}
        self._average(sums, len(x), workers)
        for name in ATTACKERS:
            gram, cross = self.averages[f"{name}.aa"], self.averages[f"{name}.ay"]
            self.averages[f"{name}.solved"] = _ridge(gram, cross, UNITS_RIDGE)

    def mlps(self, chain: PackedChains, seen: Seen | None = None) -> list[AttackedMLP]:
        """What each attacker makes of the chain; with `seen`, of a graph, differentiable by the chain's weights."""
        return [self._mlp(name, chain, seen) for name in ATTACKERS]

    def _mlp(self, name: str, chain: PackedChains, seen: Seen | None) -> AttackedMLP:
        rows, solved = self._rows(name, chain), self.averages[f"{name}.solved"]
        if seen is not None:
            form, x = _Form.of(chain), seen.x.detach()
            if name == "linearised":
                rows = _moved(rows, self.averages["xx"], form.inputs(x), seen.before, max(self.gradient_ridge, ROWS_RIDGE))
            solved = _moved(solved, self.averages[f"{name}.aa"], form.units(x, rows), seen.y, max(self.gradient_ridge, UNITS_RIDGE))
        return AttackedMLP(rows, solved, chain)

    def _rows(self, name: str, chain: PackedChains) -> torch.Tensor:
        if name == "linearised":
            return self.averages["linearised.rows"]
        rows = chain.read[:, 0] * chain.read_rms[0]
        if chain.read_bias is not None:
            rows = torch.cat([rows, chain.read_bias[:, 0] * chain.bias_rms[0]], 1)
        return rows.transpose(0, 1).flatten(1)

    def _average(self, sums: dict[str, torch.Tensor], tokens: int, workers: Workers) -> None:
        counted = [*sums.values(), torch.full((1,), float(tokens), device=next(iter(sums.values())).device)]
        workers.sum_(counted)
        for name, value in zip(sums, counted, strict=False):
            mean, old = value / counted[-1], self.averages.get(name)
            self.averages[name] = mean if old is None else old.lerp(mean, 1 - MEMORY)


class Hardening:
    """The attackers of all layers, and what they add to phase 2's loss."""

    def __init__(self, config: LockConfig, layers: int, steps: int):
        self.weight, self.cap = config.hardening_weight, config.hardening_cap
        self.first_step, self.full_step = FIRST_SHARE * steps, FULL_SHARE * steps
        self.layers = [LayerAttackers() for _ in range(layers)]

    def weight_at(self, step: int) -> float:
        """The weight in a step: 0 until the averages hold something, then rising, then full."""
        rise = (step - self.first_step) / max(1.0, self.full_step - self.first_step)
        return self.weight * min(1.0, max(0.0, rise))

    def save(self, file: Path) -> None:
        averages = [(i, name, value) for i, layer in enumerate(self.layers) for name, value in layer.averages.items()]
        save_file({f"{index}.{name}": value.contiguous() for index, name, value in averages}, file)

    def load(self, file: Path, device: torch.device) -> None:
        for key, value in load_file(file, device=str(device)).items():
            index, name = key.split(".", 1)
            self.layers[int(index)].averages[name] = value


def _factor(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    shift = ridge * gram.diagonal().mean()
    return torch.linalg.cholesky(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _ridge(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    return torch.cholesky_solve(cross, _factor(gram, ridge))


def _moved(
    solved: torch.Tensor, gram: torch.Tensor, a: torch.Tensor, y: torch.Tensor, ridge: float
) -> torch.Tensor:
    """`solved` itself, with the gradient that it has as the solution of a ridge regression of `y` on `a`."""
    move = torch.cholesky_solve(a.T @ (y - a @ solved) / len(a), _factor(gram, ridge))
    return solved + move - move.detach()
