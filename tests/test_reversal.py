"""Reversible chains against plain autograd: the same gradients from fewer saved values."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB
from torch import nn

from lockkit.attack.cost import SavedTensors
from lockkit.dlr.cost import MLPShape, dlr_saved_values
from lockkit.dlr.net import DLRNet, block_ranks
from lockkit.dlr.reversal import reversal, reversible_chain


def random_chain(hidden, width, depth, gated=True, bias=False, gain=1.0, activation=torch.nn.functional.silu, seed=0):
    torch.manual_seed(seed)
    chain = DLRNet(hidden, block_ranks(width, depth), activation, gated, bias, output_bias=bias, gain=gain)
    if bias:
        nn.init.normal_(chain.output_bias)
    return chain


def gradients(chain: nn.Module, x: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of a fixed scalar with respect to the input and everything trainable."""
    x = x.clone().requires_grad_()
    chain.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = chain(x)
    generator = torch.Generator().manual_seed(1)
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in chain.named_parameters() if parameter.requires_grad}
    return {"output": out.detach(), "x": x.grad, **found}


def relative_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Rms of the difference over rms, over all gradients together."""
    assert got.keys() == want.keys()
    names = [name for name in want if name != "output"]
    difference = sum((got[name].double() - want[name].double()).square().sum() for name in names)
    return float((difference / sum(want[name].double().square().sum() for name in names)).sqrt())


KINDS = {
    "hidden": st.integers(1, 9),
    "width": st.integers(2, 12),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "gain": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    "anchor_every": st.sampled_from([None, 1, 2, 3, 100]),
    "data": st.data(),
}


@settings(max_examples=15, deadline=None)
@given(**KINDS)
def test_gradients_are_those_of_finite_differences(hidden, width, gated, bias, gain, anchor_every, data):
    depth = data.draw(st.integers(1, min(width, 5)))
    chain = random_chain(hidden, width, depth, gated, bias, gain, torch.tanh).double()
    names, parameters = zip(*chain.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(chain, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 2, hidden, dtype=torch.float64, requires_grad=True)
    with reversal(chain, anchor_every):
        assert torch.autograd.gradcheck(function, (x, *parameters))


@settings(max_examples=60, deadline=None)
@given(**KINDS, frozen=st.sets(st.sampled_from(["gate_proj", "up_proj", "down_proj", "bias"])))
def test_gradients_are_those_of_autograd(hidden, width, gated, bias, gain, anchor_every, data, frozen):
    chain = random_chain(hidden, width, data.draw(st.integers(1, width)), gated, bias, gain)
    for name, parameter in chain.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    x = torch.randn(2, 3, hidden)
    want = gradients(chain, x)
    with reversal(chain, anchor_every):
        got = gradients(chain, x)
    assert torch.equal(got["output"], want["output"])
    assert relative_error(got, want) < 1e-5


def test_an_input_that_needs_no_gradient_gets_none():
    chain, x = random_chain(8, 12, 4), torch.randn(3, 8)
    chain(x).square().sum().backward()
    want = {name: parameter.grad.clone() for name, parameter in chain.named_parameters()}
    chain.zero_grad()
    reversible_chain(chain, x).square().sum().backward()
    assert x.grad is None
    for name, parameter in chain.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert reversible_chain(chain, x).grad_fn is None
    chain.requires_grad_(False)
    assert reversible_chain(chain, x).grad_fn is None


class Adapted(nn.Module):
    """A linear layer with a LoRA adapter."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("anchor_every", [None, 1, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_adapters_are_those_of_autograd(gated, autocast, anchor_every):
    chain = random_chain(16, 24, 6, gated, bias=True)
    for block in chain.blocks:
        for name in ("gate_proj", "up_proj", "down_proj"):
            if getattr(block, name) is not None:
                setattr(block, name, Adapted(getattr(block, name)))
    x = torch.randn(2, 5, 16)
    want = gradients(chain, x, autocast)
    with reversal(chain, anchor_every):
        got = gradients(chain, x, autocast)
    assert sum(".up." in name for name in want) == 6 * (3 if gated else 2)
    assert torch.equal(got["output"], want["output"])
    assert relative_error(got, want) < (0.03 if autocast else 1e-5)


def test_gradients_of_peft_adapters_are_those_of_autograd():
    from peft import LoraConfig, inject_adapter_in_model

    chain = random_chain(16, 24, 6)
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    chain = inject_adapter_in_model(config, chain)
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
    x = torch.randn(2, 5, 16)
    want = gradients(chain, x)
    with reversal(chain):
        got = gradients(chain, x)
    assert sum("lora_" in name for name in got) == 2 * 3 * 6
    assert relative_error(got, want) < 1e-5


def test_a_reversible_pass_caches_no_casts_without_gradient():
    chain = random_chain(16, 24, 6)
    chain.blocks[0].up_proj = Adapted(chain.blocks[0].up_proj)  # selects the path for any linear layers
    x = torch.randn(2, 5, 16)
    want = gradients(chain, x, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        with reversal(chain):
            reversible = gradients(chain, x, autocast=True)
        plain = gradients(chain, x, autocast=True)
    assert relative_error(reversible, want) < 0.03
    assert relative_error(plain, want) < 1e-6


def recomputation_errors(dtype: str, gain: float) -> dict[int | None, float]:
    """Relative error of bf16 gradients against plain bf16 autograd, by `anchor_every`; and that of autograd itself."""
    chain = random_chain(64, 192, 32, gain=gain)
    x = torch.randn(4, 32, 64)
    if dtype == "bfloat16":
        chain, x = chain.bfloat16(), x.bfloat16()
    want = gradients(chain, x, autocast=dtype == "autocast")
    errors = {}
    for anchor_every in (None, 6, 1):
        with reversal(chain, anchor_every):
            got = gradients(chain, x, autocast=dtype == "autocast")
        assert torch.equal(got["output"], want["output"])
        errors[anchor_every] = relative_error(got, want)
    exact = gradients(copy.deepcopy(chain).double(), x.double())
    errors["plain autograd"] = relative_error(want, exact)
    print(dtype, gain, errors)
    return errors


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
@pytest.mark.parametrize("gain", [0.5, 1.0])
def test_errors_in_bf16_are_small_and_anchors_bound_them(dtype, gain):
    errors = recomputation_errors(dtype, gain)
    # Recomputing in fp32 adds less error than bf16 has anyway, and anchors reduce it.
    assert errors[1] < errors[6] < errors[None] < 0.7 * errors["plain autograd"] < 0.02
    assert errors[1] < 0.001


def saved_values(chain: nn.Module, x: torch.Tensor) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in chain.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = chain(x)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("depth", [2, 8, 16])
@pytest.mark.parametrize(("gated", "units", "plain_units"), [(True, 2, 4), (False, 1, 2)])
def test_saved_values_shrink_as_predicted(depth, gated, units, plain_units):
    hidden, width, tokens = 32, 48, 10
    chain, x = random_chain(hidden, width, depth, gated), torch.randn(tokens, hidden, requires_grad=True)
    assert saved_values(chain, x) / tokens == depth * hidden + plain_units * width
    with reversal(chain):
        assert saved_values(chain, x) / tokens == hidden + units * width
    with reversal(chain, anchor_every=4):
        anchors = len({*range(0, depth, 4), depth - 1})
        assert saved_values(chain, x) / tokens == anchors * hidden + units * width
    chain.requires_grad_(False)
    with reversal(chain):  # no gate or up matrix is trained: block inputs are not needed
        assert saved_values(chain, x) / tokens == units * width


def test_a_whole_model_has_the_same_gradients_and_is_restored(locks):
    from lockkit.models.load import load_model

    model, _ = load_model(locks("gemma2"), torch.float32)
    ids = torch.randint(1, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    want = step()
    for anchor_every in (None, 2):
        with reversal(model, anchor_every):
            assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
            assert relative_error(step(), want) < 1e-5
    with pytest.raises(RuntimeError, match="stop"), reversal(model):
        raise RuntimeError("stop")
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)
    assert relative_error(step(), want) == 0


def test_what_the_docs_say_saves_the_bytes_they_say(locks):
    from lockkit.models.load import load_model

    model, _ = load_model(locks("qwen3"), torch.float32)
    model.requires_grad_(True)
    ids = torch.randint(1, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    page = (Path(__file__).parents[1] / "docs" / "threat-model.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"`(with reversal\(model\): [^`]+)`", page)
    saved = []
    for code in ("model(...).loss.backward()", statement):
        with SavedTensors(model.parameters()) as counter:
            exec(code.replace("...", "ids, labels=ids"), {"model": model, "ids": ids, "reversal": reversal})
        saved.append(counter.bytes)
    sizes = MLPShape(model.config.hidden_size, model.config.intermediate_size)
    values = dlr_saved_values(sizes, QUICK["depth"]) - (sizes.hidden_size + 2 * sizes.intermediate_size)
    assert saved[0] - saved[1] == 4 * values * ids.numel() * model.config.num_hidden_layers


def test_a_model_without_chains_is_not_changed(originals):
    from lockkit.models.load import load_model

    model, _ = load_model(originals("llama"), torch.float32)
    with reversal(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_invalid_anchors_and_dropout_are_refused():
    chain, x = random_chain(8, 12, 4), torch.randn(3, 8)
    for anchor_every in (0, -1):
        with pytest.raises(ValueError, match="anchor_every must be at least 1"):
            reversible_chain(chain, x, anchor_every)
        with pytest.raises(ValueError, match="anchor_every must be at least 1"), reversal(chain, anchor_every):
            pass
    chain.blocks[0].up_proj = nn.Sequential(chain.blocks[0].up_proj, nn.Dropout(0.5))
    with pytest.raises(ValueError, match="dropout inside a chain"):
        reversible_chain(chain, x)
    reversible_chain(chain.eval(), x)


def test_second_derivatives_are_refused():
    chain, x = random_chain(4, 6, 2), torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(reversible_chain(chain, x).sum(), x, create_graph=True)
