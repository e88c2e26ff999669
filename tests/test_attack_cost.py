"""The cost meter against values counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lockkit.attack.cost import Cost, LiveTensors, Meter, SavedTensors, flop_counter, measure_step

CPU = torch.device("cpu")


def toy() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)), torch.randn(5, 8)


def test_operations_of_a_step_are_those_counted_by_hand():
    model, x = toy()
    with flop_counter() as counter:
        model(x).sum().backward()
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    # Both weights get a gradient; only the second layer needs the gradient of its input.
    backward = forward + 2 * 5 * 16 * 4
    assert counter.get_total_flops() == forward + backward


def test_attention_on_a_cpu_is_counted():
    query = torch.randn(2, 3, 7, 4)
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 7 * 7 * 4)


def test_saved_bytes_are_activations_without_weights():
    model, x = toy()
    with SavedTensors(model.parameters()) as saved:
        model(x).sum().backward()
    # The input of each linear layer; the ReLU saves its output, which is the second one's input.
    assert saved.bytes == 4 * (5 * 8 + 5 * 16)


def test_tensors_saved_inside_a_backward_pass_are_not_counted():
    model, x = toy()
    x.requires_grad_()

    class RunAgain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return model(x)

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                again = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(model(again), again, gradient)

    with SavedTensors(model.parameters()) as saved:
        RunAgain.apply(x).sum().backward()
    assert saved.bytes == 4 * 5 * 8


def test_peak_of_live_tensors_is_that_counted_by_hand():
    a = torch.zeros(100)  # 400 bytes
    with LiveTensors(CPU, [a]) as live:
        b = a + 1  # 800
        c = b * 2  # 1200, the peak
        del b  # 800
        d = c.view(10, 10)  # a view needs no memory
        del c, d  # 400
        e = torch.ones(50)  # 600
    assert live.peak == 1200
    assert live.bytes == 600
    assert e.sum() == 50


def test_checkpointing_lowers_the_peak_and_adds_a_forward_pass():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(8))
    x = torch.randn(256, 32, requires_grad=True)

    def run(checkpointed: bool) -> None:
        y = x
        for layer in layers:
            f = lambda value, layer=layer: torch.tanh(torch.tanh(layer(value)))  # noqa: E731
            y = torch.utils.checkpoint.checkpoint(f, y, use_reentrant=False) if checkpointed else f(y)
        y.sum().backward()
        layers.zero_grad()
        x.grad = None

    plain = measure_step(lambda: run(False), layers.parameters(), CPU)
    checkpointed = measure_step(lambda: run(True), layers.parameters(), CPU)
    forward = 8 * 2 * 256 * 32 * 32
    assert plain.flops == 3 * forward
    assert checkpointed.flops == 4 * forward
    assert checkpointed.peak_tensor_bytes < 0.8 * plain.peak_tensor_bytes
    assert checkpointed.saved_bytes < plain.saved_bytes


def test_eigenvalue_problems_are_counted():
    matrix = torch.eye(6)
    with Meter(CPU) as meter:
        torch.linalg.eigh(matrix)
    assert meter.cost.flops == 9 * 6**3
    assert meter.cost.seconds > 0


def test_a_sum_of_costs_adds_work_and_takes_the_larger_peak():
    total = Cost(steps=2, tokens=10, flops=5.0, peak_tensor_bytes=7) + Cost(
        steps=1, tokens=4, flops=1.0, peak_tensor_bytes=9
    )
    assert (total.steps, total.tokens, total.flops, total.peak_tensor_bytes) == (3, 14, 6.0, 9)


@pytest.mark.gpu
def test_live_tensors_agree_with_what_cuda_allocates():
    device = torch.device("cuda")
    x = torch.randn(1024, 1024, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with LiveTensors(device) as live:
        y = x + 1
        z = y * 2
        del y, z
    assert live.peak == torch.cuda.max_memory_allocated() - before
