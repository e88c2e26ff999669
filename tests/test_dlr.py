"""The DLR-Net against an independent NumPy implementation, and its predicted costs against autograd."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lockkit.dlr.cost import dlr_parameters, dlr_saved_values, mlp_parameters, mlp_saved_values
from lockkit.dlr.mlp import MLPShape
from lockkit.dlr.net import ChainConfig, DLRNet, block_ranks
from lockkit.dlr.view import load_side_by_side, side_by_side, walk

SIZES = st.integers(1, 3000)


@given(SIZES, SIZES)
def test_ranks_divide_the_width_exactly_and_evenly(width, depth):
    if depth > width:
        with pytest.raises(ValueError, match="depth must be between 1 and"):
            block_ranks(width, depth)
        return
    ranks = block_ranks(width, depth)
    assert len(ranks) == depth and sum(ranks) == width
    assert max(ranks) - min(ranks) <= 1 and min(ranks) >= 1


def numpy_chain(chain: DLRNet, x: np.ndarray) -> np.ndarray:
    """The chain's equations, in the notation of lockkit/dlr/net.py, one block after the other."""

    def weight(module):
        return module.weight.detach().double().numpy()

    def bias(module):
        return 0 if module.bias is None else module.bias.detach().double().numpy()

    s = np.zeros_like(x)
    for block in chain.blocks:
        t = x + chain.gain * s
        v = t @ weight(block.up_proj).T + bias(block.up_proj)
        if block.gate_proj is None:
            a = np.tanh(v)
        else:
            a = np.tanh(t @ weight(block.gate_proj).T + bias(block.gate_proj)) * v
        s = s + a @ weight(block.down_proj).T
    return s + (0 if chain.output_bias is None else chain.output_bias.detach().double().numpy())


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.integers(1, 9),
    width=st.integers(2, 12),
    data=st.data(),
    gated=st.booleans(),
    bias=st.booleans(),
    gain=st.floats(0.1, 3),
)
def test_chain_computes_its_equations(hidden, width, data, gated, bias, gain):
    depth = data.draw(st.integers(1, width))
    torch.manual_seed(hidden * width)
    chain = DLRNet(hidden, block_ranks(width, depth), torch.tanh, gated, bias, output_bias=bias, gain=gain)
    if bias:
        nn.init.normal_(chain.output_bias)
    x = torch.randn(2, 3, hidden)
    expected = numpy_chain(chain, x.double().numpy())
    np.testing.assert_allclose(chain(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def any_chain(hidden: int, width: int, depth: int, gated: bool, bias: bool, gain: float = 0.7) -> DLRNet:
    torch.manual_seed(hidden * width + depth)
    chain = DLRNet(hidden, block_ranks(width, depth), torch.tanh, gated, bias, output_bias=bias, gain=gain)
    for parameter in chain.parameters():
        nn.init.normal_(parameter, std=0.5)
    return chain.requires_grad_(False)


CHAINS = given(
    hidden=st.integers(1, 9),
    width=st.integers(2, 12),
    depth=st.integers(1, 12),
    gated=st.booleans(),
    bias=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@CHAINS
def test_a_walk_yields_every_step_of_the_chain(hidden, width, depth, gated, bias):
    chain = any_chain(hidden, width, min(width, depth), gated, bias)
    x = torch.randn(3, hidden)
    steps = list(walk(chain, x))
    assert [step.block for step in steps] == list(chain.blocks)
    for before, step in zip([None, *steps], steps, strict=False):
        expected = x if before is None else x + chain.gain * before.stream
        torch.testing.assert_close(step.t, expected)
        torch.testing.assert_close(step.update, step.block(step.t, chain.activation))
        assert len(step.before) == 1 + gated
    out = steps[-1].stream + (chain.output_bias if bias else 0)
    torch.testing.assert_close(out, chain(x), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@CHAINS
def test_blocks_run_in_two_parts_give_the_same_stream(hidden, width, depth, gated, bias):
    chain = any_chain(hidden, width, min(width, depth), gated, bias)
    x, middle = torch.randn(3, hidden), len(chain.blocks) // 2
    stream = chain.run_blocks(x, last=middle) if middle else None
    stream = chain.run_blocks(x, stream, first=middle)
    torch.testing.assert_close(stream, chain.run_blocks(x), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@CHAINS
def test_weights_side_by_side_are_the_uncoupled_chain_and_can_be_loaded_back(hidden, width, depth, gated, bias):
    chain = any_chain(hidden, width, min(width, depth), gated, bias)
    weights, x = side_by_side(chain), torch.randn(3, hidden)
    assert weights.shape == MLPShape(hidden, width, gated, bias, bias)
    again = any_chain(hidden, width, min(width, depth), gated, bias, gain=chain.gain)
    chain.gain = 0.0
    torch.testing.assert_close(weights.output(x, chain.activation), chain(x), rtol=1e-4, atol=1e-4)
    chain.gain = again.gain
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    load_side_by_side(again, weights)
    for name, value in chain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_selecting_all_units_in_another_order_keeps_the_output():
    weights = side_by_side(any_chain(5, 9, 2, gated=True, bias=True))
    x, order = torch.randn(4, 5), torch.randperm(9)
    chosen = weights.select(order)
    torch.testing.assert_close(chosen.units(x, torch.tanh), weights.units(x, torch.tanh)[:, order])
    torch.testing.assert_close(chosen.output(x, torch.tanh), weights.output(x, torch.tanh))


def test_a_chain_config_is_the_same_after_json():
    config = ChainConfig(4, (0.5, 1.0), "silu", gated=False, bias=True)
    assert ChainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalised": True}, "normalised"),
        ({"depth": "8"}, "dlr.depth"),
        ({"depth": 0}, "dlr.depth"),
        ({}, "activation"),
    ],
)
def test_an_invalid_chain_config_is_refused_with_its_entry(change, message):
    values = ChainConfig(4, (0.5,), "silu").to_dict() | change
    if not change:
        del values["activation"]
    with pytest.raises(ValueError, match=message):
        ChainConfig.from_dict(values)


@pytest.mark.parametrize("shape", [MLPShape(16, 24), MLPShape(16, 24, gated=False, bias=True, output_bias=True)])
@pytest.mark.parametrize("depth", [1, 5, 24])
def test_the_parameter_count_is_the_mlps_at_any_depth(shape, depth):
    chain = DLRNet(
        shape.hidden_size,
        block_ranks(shape.intermediate_size, depth),
        torch.tanh,
        shape.gated,
        shape.bias,
        shape.output_bias,
    )
    counted = sum(p.numel() for p in chain.parameters())
    assert counted == dlr_parameters(shape, depth) == mlp_parameters(shape)


def saved_values(module: nn.Module, x: torch.Tensor) -> int:
    """Number of values that autograd saves for the backward pass, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("depth", [2, 8, 16])
def test_predicted_saved_values_of_a_chain_are_those_of_autograd(depth):
    hidden, width, tokens = 32, 48, 10
    chain = DLRNet(hidden, block_ranks(width, depth), nn.SiLU())
    measured = saved_values(chain, torch.randn(tokens, hidden)) / tokens
    assert measured == pytest.approx(dlr_saved_values(MLPShape(hidden, width), depth), rel=0.01)


def test_predicted_saved_values_of_an_mlp_are_those_of_autograd(originals):
    from lockkit.models.families import decoder_layers
    from lockkit.models.load import load_model

    model, _ = load_model(originals("llama"))
    mlp, config = decoder_layers(model)[0].mlp, model.config
    measured = saved_values(mlp, torch.randn(10, config.hidden_size)) / 10
    expected = mlp_saved_values(MLPShape(config.hidden_size, config.intermediate_size))
    assert measured == pytest.approx(expected, rel=0.01)
