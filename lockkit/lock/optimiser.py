"""The optimiser of both phases: Adam with a step size relative to each matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

WARM_UP_SHARE = 0.03


class RelativeAdam:
    """AdamW without decay whose step is a share of the parameters' rms at the start.

    A pretrained matrix may have an rms of 0.5 or 0.005; one step size given as a share of it
    suits both, which an absolute one does not. Matrices of one shape share a step size; biases
    take that of all matrices together. Warm-up over the first 3 % of the steps, then a cosine
    to zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], share: float, steps: int):
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        typical = _rms([p for same in by_shape.values() for p in same if p.ndim > 1])
        groups = [
            {"params": same, "lr": share * (_rms(same) if len(shape) > 1 else typical)}
            for shape, same in by_shape.items()
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        warm_up = max(1, int(steps * WARM_UP_SHARE))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda step: (
                (step + 1) / warm_up
                if step < warm_up
                else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
            ),
        )

    def step(self) -> None:
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)


@torch.no_grad()
def _rms(parameters: list[nn.Parameter]) -> float:
    count = sum(p.numel() for p in parameters)
    return math.sqrt(sum(p.float().square().sum().item() for p in parameters) / count) if count else 0.0
