"""The optimiser of both phases: Adam with a scheduled learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lockkit.training import learning_rate_share

# A third of this let chains of 64 and 128 blocks diverge, and helped none (tools/results/phases.md).
WARM_UP_SHARE = 0.1


class ScheduledAdam:
    """Adam (AdamW without weight decay) with warm-up over the first 10 % of the steps, then a cosine to zero.

    The learning rate is absolute. It suits every layer because the parameters have an rms of 1 at
    the start (`PackedChains` rescales them): a pretrained matrix may have 0.5 or 0.005.

    Args:
        parameters: to train.
        learning_rate: at its peak.
        steps: of the whole run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, steps: int):
        # Gradients of small matrices are small: eps must not drown them.
        self.optimiser = torch.optim.AdamW(
            parameters, lr=learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
        )
        self.learning_rate = learning_rate
        self.steps = steps
        self.warm_up = max(1, int(steps * WARM_UP_SHARE))

    def step(self, step: int) -> None:
        """Update the parameters; `step` counts from 0."""
        share = learning_rate_share(step, self.steps, self.warm_up, warm_up_reaches_peak=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * share
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
