"""The same function in other coordinates, where an optimiser may go faster.

A chain computes the same after either of these changes of its factors:

- *balanced*: in a gated block, `u = U diag(1/c) diag(c) V t`: each unit's up row and down column are scaled to
  the same norm. (Two-layer families with an activation that is not homogeneous stay as they are.)
- *orthogonal*: every factor `W` becomes a product `R Q` with `Q` orthonormal along its longer side (QR
  decomposition), and both are trained: a weight's gradient is then seen through well-conditioned factors.

In both, each matrix gets a learning rate in proportion to the size of its weights, as in LARS (You et al.
2017, arXiv 1708.03888), so that all blocks move by the same share of themselves.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import parametrize

from lockkit.attack.base import GradientAttack
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.optimisers import BETAS
from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import block_weights
from lockkit.models.families import decoder_layers, mlp_weights

MAX_RATE_RATIO = 10.0  # between a matrix' learning rate and the run's, to either side


class ReparametriseConfig(FinetuneConfig):
    form: Literal["balanced", "orthogonal"] = Field("balanced", description="The coordinates, see above.")


class Reparametrise(GradientAttack):
    name = "reparametrise"
    description = "Rescale or orthogonalise the chains' factors without changing the function; a rate for each block."
    reference = "this project; per-layer rates: You et al. 2017, arXiv 1708.03888"
    family = "optimisation"
    lock_aware = True
    Config = ReparametriseConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        return [{"form": "balanced"}, {"form": "orthogonal"}]

    def prepare(self, model, bench) -> Training:
        mlps = [layer.mlp for layer in decoder_layers(model)]
        for mlp in mlps:
            if self.config.form == "orthogonal":
                orthogonalise(mlp)
            elif bench.family.gated:
                balance(mlp, bench.family)
        matrices = [p for mlp in mlps for p in mlp.parameters() if p.ndim == 2]
        own = {id(p) for p in matrices}
        sizes = torch.stack([p.detach().square().mean().sqrt() for p in matrices]).cpu()
        shares = (sizes / sizes.median()).clamp(1 / MAX_RATE_RATIO, MAX_RATE_RATIO)
        rate = self.config.learning_rate
        groups = [{"params": [p for p in model.parameters() if id(p) not in own]}]
        groups += [{"params": [p], "lr": rate * share.item()} for p, share in zip(matrices, shares, strict=True)]
        optimiser = torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=0.0)
        return Training(model, list(model.parameters()), optimiser)


def _blocks(mlp: nn.Module, family) -> list[MLPWeights]:
    """The blocks of a chain, or an ordinary MLP as the only one."""
    if not isinstance(mlp, DLRNet):
        return [mlp_weights(mlp, family)]
    return [block_weights(block) for block in mlp.blocks]


@torch.no_grad()
def balance(mlp: nn.Module, family) -> None:
    """Give each unit's up row and down column the same norm; only for gated blocks, which are linear in them."""
    for block in _blocks(mlp, family):
        up, down = block.up.norm(dim=1), block.down.norm(dim=0)
        scale = torch.where((up > 0) & (down > 0), (down / up).sqrt(), torch.ones_like(up))
        block.up.mul_(scale[:, None])
        block.down.div_(scale)
        if block.up_bias is not None:
            block.up_bias.mul_(scale)


def orthogonalise(mlp: nn.Module) -> None:
    """Write the matrix of every linear layer in `mlp` as a product with an orthonormal factor."""
    for module in list(mlp.modules()):
        if type(module) is nn.Linear:
            parametrize.register_parametrization(module, "weight", _Product())


class _Product(nn.Module):
    """A matrix, `[out, in]`, as (square, orthonormal): the square factor is on its shorter side."""

    def forward(self, square: torch.Tensor, orthonormal: torch.Tensor) -> torch.Tensor:
        rows, columns = orthonormal.shape
        return square @ orthonormal if rows <= columns else orthonormal @ square

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = weight.shape[0] <= weight.shape[1]
        orthonormal, square = torch.linalg.qr(weight.T if wide else weight)
        return (square.T.contiguous(), orthonormal.T.contiguous()) if wide else (square, orthonormal)
