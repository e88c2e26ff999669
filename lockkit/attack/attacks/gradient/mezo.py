"""Zeroth-order training: two forward passes per step and no backward pass (MeZO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.losses import logits_of, task_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


class MezoConfig(FinetuneConfig):
    """Settings of `mezo`."""

    epsilon: float = Field(1e-3, gt=0, description="Size of the random steps at which the loss is measured.")


class Mezo(GradientAttack):
    """MeZO: gradients from two forward passes along one random direction."""

    name = "mezo"
    description = "Zeroth order: the losses after a random step and after its opposite give the gradient along it."
    reference = "Malladi et al. 2023, arXiv 2305.17333"
    family = "zeroth order"
    Config = MezoConfig
    config: MezoConfig
    learning_rate_factor = 1e-3
    learning_rate_range = (1e-7, 1e-4)

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights of `model` without an optimiser and without a backward pass."""
        parameters = list(model.parameters())
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)

        def move(seed: int, factor: float) -> None:
            # The same seed gives the same direction, so directions are not stored.
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
