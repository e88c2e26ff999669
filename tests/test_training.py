"""Orders of training data and courses of learning rates, against their definitions written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lockkit.lock.optimiser import ScheduledAdam
from lockkit.training import learning_rate_share, shuffled_batches, shuffled_order


@pytest.mark.parametrize(("available", "wanted"), [(7, 20), (7, 7), (7, 3), (5, 0)])
def test_an_order_is_whole_shuffled_passes(available, wanted):
    """The very numbers matter: the weights of a lock depend on them."""
    generator = torch.Generator().manual_seed(3)
    passes = torch.cat([torch.randperm(available, generator=generator) for _ in range(5)])
    assert torch.equal(shuffled_order(available, wanted, seed=3), passes[:wanted])
    assert not torch.equal(shuffled_order(available, 20, seed=4), passes[:20])


@pytest.mark.parametrize("batch", [1, 3, 7, 10])
def test_batches_are_the_order_cut_up(batch):
    found = list(itertools.islice(shuffled_batches(7, batch, seed=3), 6))
    assert [len(part) for part in found] == [batch] * 6
    assert torch.equal(torch.cat(found), shuffled_order(7, 6 * batch, seed=3))


def test_the_learning_rate_rises_and_falls():
    fall = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [learning_rate_share(step, 10, 2) for step in range(10)] == [1 / 3, 2 / 3, *fall]
    assert [learning_rate_share(step, 10, 2, warm_up_reaches_peak=True) for step in range(10)] == [1 / 2, 1.0, *fall]
    assert [learning_rate_share(step, 4, 1, "constant") for step in range(4)] == [1 / 2, 1.0, 1.0, 1.0]
    assert learning_rate_share(0, 1, 0) == 1.0


def test_scheduled_adam_takes_the_steps_of_adam():
    ours, theirs = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    scheduled, adam = ScheduledAdam([ours], 0.1, steps=20), torch.optim.Adam([theirs], 0.1, (0.9, 0.95), eps=1e-12)
    for step in range(20):
        adam.param_groups[0]["lr"] = 0.1 * learning_rate_share(step, 20, 2, warm_up_reaches_peak=True)
        for parameter in (ours, theirs):
            parameter.grad = None
            (parameter * torch.arange(4.0)).square().sum().backward()
        scheduled.step(step)
        adam.step()
    torch.testing.assert_close(ours, theirs)
