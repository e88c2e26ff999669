"""Distillation against the closed-form attackers: their solutions, their gradients, and what a lock gains by it."""

from __future__ import annotations

import pytest
import torch
from test_packed import random_chains

from lockkit.attack.closed_form import collapse, units_of
from lockkit.lock.hardening import ATTACKERS, ROWS_RIDGE, UNITS_RIDGE, LayerAttackers, Seen
from lockkit.lock.packed import PackedChains
from lockkit.lock.workers import Workers

SHAPES = [(True, False), (False, True)]  # gated, with biases of units and output


def seen_by(packed: PackedChains, x: torch.Tensor) -> Seen:
    y, units_in = packed.outputs_and_units(x.unsqueeze(0))
    return Seen.of(x, units_in, y[0])


def made(gated: bool, bias: bool, tokens: int):
    (chain,) = random_chains(1, 6, 10, 3, gated, bias, bias, "silu")  # 10 units in 3 blocks: one is padded
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter *= 3  # far from linear
    packed = PackedChains([chain])
    x = torch.randn(tokens, 6, dtype=torch.float64)
    attackers = LayerAttackers(gradient_ridge=0.0)
    attackers.observe(packed, seen_by(packed, x), Workers())
    return chain, packed, x, attackers


@pytest.mark.parametrize(("gated", "bias"), SHAPES)
def test_attackers_are_those_of_the_audit(gated, bias):
    chain, packed, x, attackers = made(gated, bias, 4000)
    with torch.no_grad():
        y = chain(x)
    chain.float()
    for name, mlp in zip(ATTACKERS, attackers.mlps(packed), strict=True):
        (stage,) = collapse(chain, x.float(), [(0, 3)], name)
        units = units_of(stage.weights, x.float(), chain.activation)
        audit = torch.nn.functional.linear(units, stage.weights.down, stage.weights.down_bias)
        ours, theirs = (((found - y).square().mean() / y.square().mean()).item() for found in (mlp(x), audit.double()))
        assert 1e-3 < theirs < 0.9  # it solves something, and not everything
        assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(("gated", "bias"), SHAPES)
def test_gradient_is_that_of_the_ridge_solve(gated, bias):
    """Against autograd through `torch.linalg.solve`, on the batch the averages hold."""
    _, packed, x, attackers = made(gated, bias, 64)
    probe = torch.randn_like(x)

    def solved(a, y, ridge):
        gram = a.T @ a / len(a)
        return torch.linalg.solve(gram + ridge * gram.detach().diagonal().mean() * torch.eye(len(gram)), a.T @ y / len(a))

    def with_one(values, wanted):
        return torch.cat([values, torch.ones_like(values[:, :1])], 1) if wanted else values

    def directly(name):
        seen, one = seen_by(packed, x), with_one(x, bias)
        if name == "stacked":
            before = torch.cat([one @ _rows_of_block(packed, block, bias) for block in range(3)], 1)
        else:
            before = one @ solved(one, seen.before, ROWS_RIDGE)
        blocks = before.unflatten(-1, (3, -1))
        rank = blocks.shape[-1] // 2
        act = torch.nn.functional.silu
        units = (act(blocks[..., :rank]) * blocks[..., rank:] if gated else act(blocks)).flatten(-2)
        units = with_one(units, bias)
        return units @ solved(units, seen.y, UNITS_RIDGE)

    for name, mlp in zip(ATTACKERS, attackers.mlps(packed, seen_by(packed, x)), strict=True):
        found, expected = mlp(x), directly(name)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        gradients = [
            torch.autograd.grad((out * probe).sum(), list(packed.parameters()), retain_graph=True)
            for out in (found, expected)
        ]
        for ours, reference in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8)


def _rows_of_block(packed: PackedChains, block: int, bias: bool) -> torch.Tensor:
    rows = packed.read[block, 0] * packed.read_rms[0]
    return torch.cat([rows, packed.read_bias[block, 0] * packed.bias_rms[0]]) if bias else rows
