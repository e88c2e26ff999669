"""Parts of every training loop: the order of the data, and the schedule of the learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import torch


def shuffled_passes(available: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield permutations of `available` indices, int64 `[available]`, one per pass over the data, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(available, generator=generator)


def shuffled_order(available: int, wanted: int, seed: int) -> torch.Tensor:
    """The first `wanted` indices of shuffled passes over `available` items, int64 `[wanted]`."""
    passes = max(1, math.ceil(wanted / available))
    return torch.cat(list(itertools.islice(shuffled_passes(available, seed), passes)))[:wanted]


def shuffled_batches(available: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the indices of `shuffled_order` in batches, int64 `[batch]`, without end. A batch may span two passes."""
    passes = shuffled_passes(available, seed)
    order = next(passes)
    while True:
        while len(order) < batch:
            order = torch.cat([order, next(passes)])
        yield order[:batch]
        order = order[batch:]


def learning_rate_share(
    step: int,
    steps: int,
    warm_up: int,
    course: Literal["constant", "cosine"] = "cosine",
    warm_up_reaches_peak: bool = False,
) -> float:
    """The learning rate of one step, as a share of the peak.

    Args:
        step: counts from 0.
        steps: number of steps.
        warm_up: number of steps over which the rate rises linearly.
        course: after the warm-up. `cosine` falls towards 0, which it would reach one step after the last.
        warm_up_reaches_peak: whether the peak is at the last step of the warm-up or at the step after it.
    """
    if step < warm_up:
        return (step + 1) / (warm_up if warm_up_reaches_peak else warm_up + 1)
    if course == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
