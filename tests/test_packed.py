"""Packed chains, the form used in training, against `DLRNet` and against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lockkit.dlr.net import DLRNet, block_ranks
from lockkit.lock.packed import PackedChains

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


def random_chains(group, hidden, width, depth, gated, bias, output_bias, activation, seed=0):
    torch.manual_seed(seed)
    chains = [
        DLRNet(hidden, block_ranks(width, depth), ACTIVATIONS[activation], gated, bias, output_bias, gain=0.3 * (i + 1))
        for i in range(group)
    ]
    for chain in chains:
        chain.double()
        if chain.output_bias is not None:
            torch.nn.init.normal_(chain.output_bias)
    return chains


@settings(deadline=None, max_examples=40)
@given(
    group=st.integers(1, 3),
    hidden=st.integers(1, 9),
    depth=st.integers(2, 6),
    extra=st.integers(0, 9),
    gated=st.booleans(),
    bias=st.booleans(),
    output_bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_outputs_and_gradients_are_those_of_the_chains(
    group, hidden, depth, extra, gated, bias, output_bias, activation
):
    chains = random_chains(group, hidden, depth + extra, depth, gated, bias, output_bias, activation)
    packed = PackedChains(chains)
    x = torch.randn(group, 7, hidden, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    found = packed(x)
    expected = torch.stack([chain(x[i]) for i, chain in enumerate(chains)])
    torch.testing.assert_close(found, expected)
    (x_gradient,) = torch.autograd.grad((found * weights).sum(), x, retain_graph=True)
    torch.testing.assert_close(x_gradient, torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)[0])

    # Compare gradients through one step of gradient descent in both forms.
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    rms = {"read": packed.read_rms, "write": packed.write_rms, "read_bias": packed.bias_rms}
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            parameter -= 1e-3 * parameter.grad / rms.get(name, packed.bias_rms) ** 2
        for parameter in (p for chain in chains for p in chain.parameters()):
            parameter -= 1e-3 * parameter.grad
    stepped = random_chains(group, hidden, depth + extra, depth, gated, bias, output_bias, activation, seed=1)
    packed.unpack(stepped)
    for one, other in zip(stepped, chains, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_are_those_of_finite_differences(gated):
    packed = PackedChains(random_chains(2, 5, 11, 4, gated, True, True, "gelu"))
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    parameters = list(packed.parameters())

    def run(x, *values):
        return torch.func.functional_call(packed, dict(zip(dict(packed.named_parameters()), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_padding_stays_zero():
    """Units added to make all ranks equal stay zero under any optimiser."""
    packed = PackedChains([c.float() for c in random_chains(1, 6, 10, 4, True, False, False, "silu")])
    before = [(p == 0) for p in packed.parameters()]
    optimiser = torch.optim.AdamW(packed.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(5):
        packed(torch.randn(1, 20, 6)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for parameter, zeros in zip(packed.parameters(), before, strict=True):
        assert zeros.any() and (parameter[zeros] == 0).all() and (parameter[~zeros] != 0).all()
