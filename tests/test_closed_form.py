"""Closed-form unlocks against least squares and exact cases."""

from __future__ import annotations

import pytest
import torch
from test_attack_methods import bench_of, random_chain
from torch import nn

from lockkit.attack.attacks.unlocks.closed_form import CorrectedConfig, CorrectedStack, collapse
from lockkit.attack.unlocking import original_as_chain
from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.view import side_by_side


def test_random_features_use_only_the_function_and_agree_with_least_squares():
    chain, x = random_chain(gated=True), 0.3 * torch.randn(2048, 8)
    [stage] = collapse(chain, x, [(0, 4)], "random")
    units, out = nn.functional.silu(x @ stage.weights.gate.T) * (x @ stage.weights.up.T), chain(x)
    least = torch.linalg.lstsq(units.double(), out.double()).solution.float()
    left = [(units @ down - out).square().sum().item() for down in (stage.weights.down.T, least)]
    assert left[1] <= left[0] < 1.05 * left[1]
    for block in chain.blocks:  # the same function, other weights
        block.up_proj.weight.mul_(-3)
        block.down_proj.weight.div_(-3)
    [again] = collapse(chain, x, [(0, 4)], "random")
    torch.testing.assert_close(again.weights.up, stage.weights.up, atol=0, rtol=0)
    torch.testing.assert_close(units @ again.weights.down.T, units @ stage.weights.down.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [0, 256])
@pytest.mark.parametrize("model_type", ["qwen3", "phi"])
def test_corrected_stacks_are_exact_where_blocks_are_not_coupled(model_type, tokens, originals, locks):
    bench = bench_of(model_type, originals, locks)
    unlocked = CorrectedStack(CorrectedConfig(tokens=tokens)).unlock(original_as_chain(bench), bench)
    assert bench.quality(unlocked.model).kl_to_original < 1e-5
    assert (unlocked.blocks, unlocked.cost.tokens) == (1, tokens)
    assert (unlocked.cost.flops > 0) == (tokens > 0)


@pytest.mark.parametrize("gated", [True, False])
def test_few_tokens_correct_a_stack_and_many_make_it_as_good_as_a_solved_one(gated):
    chain = random_chain(gated, nn.functional.silu, bias=not gated, gain=0.3)
    x, held_out = 0.3 * torch.randn(16384, 8), 0.3 * torch.randn(2048, 8)

    def error(weights: MLPWeights) -> float:
        return (weights.output(held_out, chain.activation) - chain(held_out)).square().mean().item()

    def solved(first_layer: str, tokens: int) -> float:
        return error(collapse(chain, x[:tokens], [(0, 4)], first_layer)[0].weights)

    few = solved("corrected", 48)
    assert few < 1.05 * error(side_by_side(chain))
    assert few < 0.8 * solved("linearised", 48)
    assert solved("corrected", 16384) == pytest.approx(solved("linearised", 16384), rel=0.02)
