"""The optimiser of both phases: Adam with a scheduled learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lockkit.training import learning_rate_share

# With a third of this, chains of 64 and 128 blocks diverged, and no chain was better (tools/results/phases.md).
WARM_UP_SHARE = 0.1


class ScheduledAdam:
    """Adam (AdamW without weight decay). The learning rate rises over the first 10 % of the steps, then falls to 0.

    One learning rate suits every layer because `PackedChains` scales the parameters to an rms of 1. The rms of
    pretrained matrices varies, for example from 0.005 to 0.5.

    Args:
        parameters: the parameters to train.
        learning_rate: the peak.
        steps: number of steps in the run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, steps: int):
        # Gradients can be very small, so eps must be smaller.
        self.optimiser = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
        )
        self.learning_rate = learning_rate
        self.steps = steps
        self.warm_up = max(1, int(steps * WARM_UP_SHARE))

    def step(self, step: int) -> None:
        """Update the parameters and clear their gradients. `step` counts from 0."""
        share = learning_rate_share(step, self.steps, self.warm_up, warm_up_reaches_peak=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * share
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
