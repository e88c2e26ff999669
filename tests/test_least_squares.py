"""The start of a chain: the order of the units, the fit to what each block reads, and the pilot's couplings."""

from __future__ import annotations

import pytest
import torch
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import empty_chain

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.view import side_by_side
from lockkit.lock.config import LockConfig
from lockkit.lock.initialise import start_from_teacher
from lockkit.lock.least_squares import fit_to_stream
from lockkit.lock.run import lock_model
from lockkit.measure.metrics import nmse


def teacher(hidden, width, gated, scale=1.0):
    up, down, gate = (torch.randn(shape) * scale for shape in ((width, hidden), (hidden, width), (width, hidden)))
    return MLPWeights(up, down / width, gate if gated else None)


@settings(deadline=None)
@given(hidden=st.integers(2, 12), depth=st.integers(2, 6), extra=st.integers(0, 9), gain=st.floats(-2, 2))
def test_a_linear_stream_is_undone_exactly(hidden, depth, extra, gain):
    """With the identity as activation, every block reads a linear function of x, and the fit recovers x from it."""
    torch.manual_seed(0)
    weights = teacher(hidden, depth + extra, gated=False, scale=0.5)
    chain = empty_chain(weights.shape, depth, gain, torch.nn.Identity()).requires_grad_(False)
    inputs = torch.randn(400, hidden)
    start_from_teacher(chain, weights, inputs)
    fit_to_stream(chain, inputs)
    expected = weights.output(inputs, torch.nn.Identity())
    assert nmse(chain(inputs), expected) < 1e-3


def test_units_with_heavy_tails_are_in_the_last_blocks():
    """Such a unit disturbs the blocks after its own, and no linear map undoes that."""
    torch.manual_seed(0)
    weights = teacher(8, 12, gated=False)
    weights.up[3] = 0  # never active
    inputs = torch.randn(500, 8)
    inputs[::50] *= 20
    chain = empty_chain(weights.shape, 4, 1.0, torch.nn.ReLU()).requires_grad_(False)
    start_from_teacher(chain, weights, inputs)
    units = side_by_side(chain).units(inputs, torch.nn.ReLU()).double()
    kurtosis = (units**4).mean(0) / (units**2).mean(0) ** 2
    assert not side_by_side(chain).up[0].any()
    assert (kurtosis[1:].diff() >= -1e-6).all()


def test_a_teacher_of_zeros_is_left_as_it_is():
    weights = teacher(4, 8, gated=True)
    chain = empty_chain(weights.shape, 2, 1.0, torch.nn.SiLU()).requires_grad_(False)
    start_from_teacher(chain, weights, torch.zeros(10, 4))
    before = side_by_side(chain).up.clone()
    fit_to_stream(chain, torch.zeros(10, 4))
    assert torch.equal(side_by_side(chain).up, before)


def test_four_times_the_budget_is_twice_the_coupling(originals, tmp_path):
    """The KL of a layer grows with the square of its coupling."""
    found = []
    for number, budget in enumerate((1e-7, 4e-7)):
        config = LockConfig(**QUICK | {"max_kl": budget, "tokens": 512, "end_to_end_tokens": 0})
        record = lock_model(str(originals("qwen3")), tmp_path / str(number), config).record
        found.append([layer["coupling"] for layer in record["layers"]])
    assert found[1] == pytest.approx([2 * coupling for coupling in found[0]])


def test_a_coupling_in_the_recipe_replaces_the_pilot(originals, tmp_path):
    config = LockConfig(**QUICK | {"coupling": 0.05, "tokens": 512, "end_to_end_tokens": 0})
    record = lock_model(str(originals("qwen3")), tmp_path / "out", config).record
    assert {layer["coupling"] for layer in record["layers"]} == {0.05}
