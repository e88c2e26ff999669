"""All weights with less memory for gradients and optimiser state: GaLore, LOMO and AdaLOMO, BAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.losses import logits_of, task_loss
from lockkit.attack.optimisers import BETAS, Together, optional_package
from lockkit.models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects


class GaloreConfig(FinetuneConfig):
    """Settings of `galore`."""

    rank: int | None = Field(
        None, ge=1, description="Rank of projected gradients; by default a quarter of the hidden size."
    )
    update_every: int = Field(
        32,
        ge=2,
        description="Steps between updates of the projection. The paper has 200, in runs of ten thousand steps.",
    )
    scale: float = Field(0.25, gt=0, description="Factor of projected updates.")


class Galore(GradientAttack):
    """GaLore: AdamW in a low-rank projection of each matrix's gradient."""

    name = "galore"
    description = "AdamW on gradients projected to low rank, which makes the optimiser's state smaller."
    reference = "Zhao et al. 2024, arXiv 2403.03507"
    family = "memory"
    Config = GaloreConfig
    config: GaloreConfig
    learning_rate_factor = 4.0  # compensates for `scale`

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights. The gradients of the matrices in decoder layers are projected.

        Raises:
            CannotRun: pytorch-optimizer is not installed.
        """
        config = self.config
        inside = {id(p) for p in decoder_layers(model).parameters() if p.ndim == 2}
        parameters = list(model.parameters())
        projected = {
            "params": [p for p in parameters if id(p) in inside],
            "rank": config.rank or model.config.hidden_size // 4,
            "update_proj_gap": config.update_every,
            "scale": config.scale,
            "projection_type": "std",
        }
        others = {"params": [p for p in parameters if id(p) not in inside], "lr": config.learning_rate * config.scale}
        optimiser = optional_package("pytorch_optimizer").GaLore(
            [projected, others], lr=config.learning_rate, betas=BETAS, weight_decay=0.0
        )

        def projections() -> list[torch.Tensor]:
            return [state["projector"].ortho_matrix for state in optimiser.state.values() if "projector" in state]

        def projects(step: int) -> int:
            return int(step == 0 or (step + 1) % config.update_every == 0)

        return Training(model, parameters, optimiser, state=projections, kind=projects)


class LomoConfig(FinetuneConfig):
    """Settings of `lomo`."""

    form: Literal["adalomo", "lomo"] = Field("adalomo", description="Adaptive, or plain gradient descent.")


class Lomo(GradientAttack):
    """LOMO and AdaLOMO: the update is part of the backward pass."""

    name = "lomo"
    description = "Update each weight as soon as its gradient is known in the backward pass: gradients are not kept."
    reference = "Lv et al. 2023, arXiv 2306.09782 (LOMO) and 2310.10195 (AdaLOMO)"
    family = "memory"
    Config = LomoConfig
    config: LomoConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Both forms, and the adaptive one with reversal."""
        return [  # AdaLOMO's learning rates are relative to the size of a weight
            {"form": "adalomo", "learning_rate_factor": 10.0},
            {"form": "lomo", "learning_rate_factor": 100.0},
            {"form": "adalomo", "learning_rate_factor": 10.0, "saver": "reversal"},
        ]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights with the library's fused step.

        Raises:
            CannotRun: pytorch-optimizer is not installed.
        """
        config, library = self.config, optional_package("pytorch_optimizer")
        if config.form == "adalomo":
            optimiser = library.AdaLOMO(model, lr=config.learning_rate, weight_decay=0.0)
        else:
            optimiser = library.LOMO(model, lr=config.learning_rate, clip_grad_norm=config.max_gradient_norm)

        def step(ids: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
            loss = task_loss(logits_of(model, ids), labels)
            if config.form == "lomo":
                optimiser.grad_norm(loss)  # an extra backward pass: the norm must be known before the first update
            optimiser.fused_backward(loss, config.learning_rate * share)
            return loss.detach()

        def state() -> list[torch.Tensor]:
            names = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
            return [tensor for name in names for tensor in getattr(optimiser, name, {}).values()]

        return Training(model, list(model.parameters()), None, step=step, state=state)


class BAdamConfig(FinetuneConfig):
    """Settings of `badam`."""

    switch_every: int | None = Field(
        None,
        ge=1,
        description="Steps on one block of weights; by default each block gets its turn once within the budget.",
    )


class BAdam(GradientAttack):
    """BAdam: block coordinate descent with AdamW."""

    name = "badam"
    description = "AdamW on one block of weights at a time (a decoder layer, or everything outside them)."
    reference = "Luo et al. 2024, arXiv 2404.02827"
    family = "memory"
    Config = BAdamConfig
    config: BAdamConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Without and with reversal."""
        return [{}, {"saver": "reversal"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Train all weights, one block at a time."""
        config = self.config
        layers = [list(layer.parameters()) for layer in decoder_layers(model)]
        inside = {id(p) for layer in layers for p in layer}
        blocks = [[p for p in model.parameters() if id(p) not in inside], *layers]
        every = config.switch_every or max(1, config.steps // len(blocks))
        optimiser = BlockAdam(blocks, every, config.learning_rate)
        return Training(model, list(model.parameters()), optimiser, kind=optimiser.block_at)


class BlockAdam(Together):
    """AdamW on one block of weights at a time, in turn, for a number of steps each.

    Parameter groups and state are those of the current block.

    Args:
        blocks: the parameters of each block.
        every: steps on a block before the next one.
        rate: peak learning rate.
    """

    def __init__(self, blocks: list[list[nn.Parameter]], every: int, rate: float):
        super().__init__()
        self.blocks, self.every, self.rate, self.taken = blocks, every, rate, 0
        self._turn_to(0)

    def block_at(self, step: int) -> int:
        """The index of the block that a step trains. Steps are counted from 0."""
        return step // self.every % len(self.blocks)

    def _turn_to(self, index: int) -> None:
        for number, block in enumerate(self.blocks):
            for parameter in block:
                parameter.requires_grad_(number == index)
        self.optimisers = [torch.optim.AdamW(self.blocks[index], lr=self.rate, betas=BETAS, weight_decay=0.0)]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the current block, free its gradients, and turn to the next block when it is due."""
        super().step()
        self.zero_grad()
        self.taken += 1
        if self.block_at(self.taken) != self.block_at(self.taken - 1):
            self._turn_to(self.block_at(self.taken))
