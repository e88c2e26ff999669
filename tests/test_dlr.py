"""The DLR-Net against an independent NumPy version, and its costs against what autograd does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lockkit.dlr.cost import MLPShape, dlr_parameters, dlr_saved_values, mlp_parameters, mlp_saved_values
from lockkit.dlr.net import DLRNet, block_ranks

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
    """The chain's equations, written again: lock.md's notation, one block after the other."""

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


@pytest.mark.parametrize("shape", [MLPShape(16, 24), MLPShape(16, 24, gated=False, bias=True, output_bias=True)])
@pytest.mark.parametrize("depth", [1, 5, 24])
def test_parameters_equal_the_mlps_at_any_depth(shape, depth):
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
    """Values that autograd really keeps for the backward pass, weights left out."""
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
def test_saved_activations_are_those_of_autograd(depth):
    hidden, width, tokens = 32, 48, 10
    chain = DLRNet(hidden, block_ranks(width, depth), nn.SiLU())
    measured = saved_values(chain, torch.randn(tokens, hidden)) / tokens
    assert measured == pytest.approx(dlr_saved_values(MLPShape(hidden, width), depth), rel=0.01)


def test_saved_activations_of_an_mlp_are_those_of_autograd(originals):
    from lockkit.models.families import decoder_layers
    from lockkit.models.load import load_model

    model, _ = load_model(originals("llama"))
    mlp, config = decoder_layers(model)[0].mlp, model.config
    measured = saved_values(mlp, torch.randn(10, config.hidden_size)) / 10
    expected = mlp_saved_values(MLPShape(config.hidden_size, config.intermediate_size))
    assert measured == pytest.approx(expected, rel=0.01)
