"""Training the chains in other parameters, in which an optimiser may be faster.

Both changes of parameters keep the function of a chain:

- *balanced*: in a gated block, the up row and the down column of each unit are scaled by `c` and `1/c`, so that they
  have the same norm. Blocks of two layers do not change, because their activation is not homogeneous.
- *orthogonal*: every factor `W` becomes a product `R Q`, with `Q` orthonormal along its longer side (QR
  decomposition). Both `R` and `Q` are trained, so the gradient passes through well-conditioned factors.

In both, the learning rate of each matrix is proportional to the size of its weights, as in LARS (You et al.
2017, arXiv 1708.03888). So all blocks change by the same relative amount per step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

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
from lockkit.models.families import Family, decoder_layers, mlp_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects

MAX_RATE_RATIO = 10.0  # of a matrix' learning rate to the run's; its inverse is the lower limit


class ReparametriseConfig(FinetuneConfig):
    """Settings of `reparametrise`."""

    form: Literal["balanced", "orthogonal"] = Field("balanced", description="The parameters, see reparametrise.py.")


class Reparametrise(GradientAttack):
    """All weights with AdamW, with the chains or MLPs in other parameters."""

    name = "reparametrise"
    description = "Rescale or orthogonalise the chains' factors without changing the function; one rate per matrix."
    reference = "this project; per-layer rates: You et al. 2017, arXiv 1708.03888"
    family = "optimisation"
    lock_aware = True
    Config = ReparametriseConfig
    config: ReparametriseConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Both changes of parameters."""
        return [{"form": "balanced"}, {"form": "orthogonal"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Change the parameters of all chains or MLPs in place. All weights are trained."""
        mlps: list[nn.Module] = [layer.mlp for layer in decoder_layers(model)]
        for mlp in mlps:
            if self.config.form == "orthogonal":
                orthogonalise(mlp)
            elif subjects.family.gated:
                balance(mlp, subjects.family)
        matrices = [p for mlp in mlps for p in mlp.parameters() if p.ndim == 2]
        own = {id(p) for p in matrices}
        sizes = torch.stack([p.detach().square().mean().sqrt() for p in matrices]).cpu()
        shares = (sizes / sizes.median()).clamp(1 / MAX_RATE_RATIO, MAX_RATE_RATIO)
        rate = self.config.learning_rate
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in own]}]
        groups += [{"params": [p], "lr": rate * share.item()} for p, share in zip(matrices, shares, strict=True)]
        optimiser = torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=0.0)
        return Training(model, list(model.parameters()), optimiser)


def _blocks(mlp: nn.Module, family: Family) -> list[MLPWeights]:
    """The weights of the blocks of a chain; an ordinary MLP is one block."""
    if not isinstance(mlp, DLRNet):
        return [mlp_weights(mlp, family)]
    return [block_weights(block) for block in mlp.blocks]


@torch.no_grad()
def balance(mlp: nn.Module, family: Family) -> None:
    """Give the up row and the down column of each unit the same norm, in place.

    Only for a gated chain or MLP: its function is linear in both.
    """
    for block in _blocks(mlp, family):
        up, down = block.up.norm(dim=1), block.down.norm(dim=0)
        scale = torch.where((up > 0) & (down > 0), (down / up).sqrt(), torch.ones_like(up))
        block.up.mul_(scale[:, None])
        block.down.div_(scale)
        if block.up_bias is not None:
            block.up_bias.mul_(scale)


def orthogonalise(mlp: nn.Module) -> None:
    """Write the matrix of every linear layer in `mlp` as a product with an orthonormal factor, in place."""
    for module in list(mlp.modules()):
        if type(module) is nn.Linear:
            parametrize.register_parametrization(module, "weight", _Product())


class _Product(nn.Module):
    """A matrix, `[out, in]`, as a product of a square factor, on its shorter side, and an orthonormal one."""

    def forward(self, square: torch.Tensor, orthonormal: torch.Tensor) -> torch.Tensor:
        rows, columns = orthonormal.shape
        return square @ orthonormal if rows <= columns else orthonormal @ square

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = weight.shape[0] <= weight.shape[1]
        orthonormal, square = torch.linalg.qr(weight.T if wide else weight)
        return (square.T.contiguous(), orthonormal.T.contiguous()) if wide else (square, orthonormal)
