"""Zeroth order: two forward passes a step, and no backward pass (MeZO)."""

from __future__ import annotations

import torch
from pydantic import Field

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training, logits_of, task_loss


class MezoConfig(FinetuneConfig):
    epsilon: float = Field(1e-3, gt=0, description="Size of the random step to either side.")


class Mezo(GradientAttack):
    name = "mezo"
    description = "Zeroth order: the loss on both sides of a random step gives the gradient along it."
    reference = "Malladi et al. 2023, arXiv 2305.17333"
    family = "zeroth order"
    in_quick = True
    Config = MezoConfig
    learning_rate_factor = 1e-3
    learning_rate_range = (1e-7, 1e-4)

    def prepare(self, model, bench) -> Training:
        parameters = list(model.parameters())
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)

        def move(seed: int, factor: float) -> None:
            # The same seed gives the same direction again, so that none is kept.
            noise = torch.Generator(device=parameters[0].device).manual_seed(seed)
            for p in parameters:
                p.add_(torch.randn(p.shape, generator=noise, device=p.device), alpha=factor)

        @torch.no_grad()
        def step(ids: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
            seed = int(torch.randint(2**31, (1,), generator=generator))
            move(seed, config.epsilon)
            above = task_loss(logits_of(model, ids), labels)
            move(seed, -2 * config.epsilon)
            below = task_loss(logits_of(model, ids), labels)
            move(seed, config.epsilon)
            slope = (above - below).item() / (2 * config.epsilon)
            move(seed, -config.learning_rate * share * slope)
            return (above + below) / 2

        return Training(model, parameters, None, step=step)
