"""The optimiser of both phases: Adam with a step size relative to each matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

# A third of this let chains of 64 and 128 blocks diverge, and helped none (tools/results/phases.md).
WARM_UP_SHARE = 0.1


class RelativeAdam:
    """AdamW without decay whose step is a share of the parameters' rms at the start.

    A pretrained matrix may have an rms of 0.5 or 0.005; one step size given as a share of it
    suits both, which an absolute one does not. `PackedChains` keeps its parameters at unit rms,
    so the share is the step size. Warm-up over the first 10 % of the steps, then a cosine to zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], share: float, steps: int):
        # Gradients of small matrices are small: eps must not drown them.
        self.optimiser = torch.optim.AdamW(
            parameters, lr=share, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
        )
        self.share = share
        self.steps = steps
        self.warm_up = max(1, int(steps * WARM_UP_SHARE))

    def step(self, step: int) -> None:
        """Update the parameters; `step` counts from 0."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.share * self._schedule(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def _schedule(self, step: int) -> float:
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(1, self.steps - self.warm_up)))
