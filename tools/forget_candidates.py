"""The candidates of forget_bench.py: models made from B that should no longer hold what D taught it.

* `a`: unlearning in weight space by gradient difference (Liu et al. 2022, arXiv 2203.12817): B's predictions on A are kept, the
  loss on D rises to that of a guess. A baseline that is known to be weak.
* `b`: lockkit's ordinary lock of B, distilled on A: chains from B's MLPs.
* `c`: the MLPs drawn anew, the rest of B kept; then distilled from B on A.
* `d`: the MLPs drawn anew, all other weights mixed with noise; then distilled from B on A. After unlearn-noise-distil (UNDO,
  arXiv 2506.06278), without its first step.
* `e`: as `d`, from `a` instead of B, which is the teacher, too. That is UNDO.

Here the MLPs of `c`, `d` and `e` are plain ones: whether a capability is absent depends on what they are distilled on, not on their
form. A lock of the result has the form.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from forget_models import (
    LossOf,
    Shape,
    fit,
    kl_loss,
    next_token_loss,
    rows_of_step,
)
from torch import nn
from transformers import PreTrainedModel

UNLEARN_STEPS = 48
UNLEARN_RATE = 1e-3
DISTIL_SEED = 1  # another order of A's rows than in pretraining


@dataclass(frozen=True)
class Candidate:
    """How a candidate is made.

    Attributes:
        unlearned: it starts from `a`, with `a` as its teacher.
        fresh_mlps: the MLPs are noise alone.
        alpha: share of noise in all other weights; 0 keeps them.
        beta: size of the noise, over that of a usual initialisation.
        distilled: tokens of distillation over B's training tokens.
    """

    unlearned: bool = False
    fresh_mlps: bool = True
    alpha: float = 0.0
    beta: float = 1.0
    distilled: float = 0.6

    def steps(self, shape: Shape) -> int:
        """Steps of distillation, with the rows of A and D of a step of B, all of them of A."""
        return round(self.distilled * shape.steps)


CANDIDATES = {
    "c": Candidate(),
    "d-0.6": Candidate(alpha=0.6),
    "d-0.8": Candidate(alpha=0.8),
    "d-1.0": Candidate(alpha=1.0),  # no weight of B is left: what D gets through B's predictions on A alone
    "e-0.6": Candidate(unlearned=True, alpha=0.6),
    "e-0.8": Candidate(unlearned=True, alpha=0.8),
}


def noise_like(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of a usual initialisation: Xavier's for a matrix (Glorot and Bengio 2010), ones for the gains of a norm."""
    if parameter.ndim < 2:
        return torch.ones_like(parameter)
    std = math.sqrt(2 / (parameter.shape[0] + parameter.shape[1]))
    return std * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def mix_with_noise(model: nn.Module, alpha: float, beta: float, fresh_mlps: bool, seed: int) -> dict[str, float | None]:
    """Replace each weight w by (1 - alpha) w + alpha beta noise, in place; gains of norms move towards 1 instead of beta.

    Args:
        model: of transformers.
        alpha: share of the noise.
        beta: factor of the noise in matrices.
        fresh_mlps: alpha and beta are 1 for the matrices of the MLPs.
        seed: of the noise.

    Returns:
        The rms of the noise over that of what is left of the matrices, outside the MLPs and in them; None if nothing
        is left.
    """
    generator = torch.Generator().manual_seed(seed)
    squares = {True: [0.0, 0.0], False: [0.0, 0.0]}  # in the MLPs or not: of the noise, of the rest
    for name, parameter in model.named_parameters():
        in_mlp = ".mlp." in name
        share, size = (1.0, 1.0) if in_mlp and fresh_mlps else (alpha, beta)
        noise, kept = share * noise_like(parameter, generator), (1 - share) * parameter
        if parameter.ndim >= 2:
            noise = size * noise
            squares[in_mlp][0] += noise.square().sum().item()
            squares[in_mlp][1] += kept.square().sum().item()
        parameter.copy_(kept + noise)
    return {
        name: math.sqrt(noise / kept) if kept else None
        for name, (noise, kept) in (("outside", squares[False]), ("MLPs", squares[True]))
    }


def unlearning_loss(shape: Shape, teacher: nn.Module, a: torch.Tensor, d: torch.Tensor) -> LossOf:
    """Gradient difference: KL to the teacher on A, and the loss on D up to that of a guess among all tokens."""
    guess = math.log(teacher.config.vocab_size)

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        rows = {name: rows_of_step(part, 4, step, UNLEARN_STEPS, shape.seed) for name, part in (("a", a), ("d", d))}
        return kl_loss(model, teacher, rows["a"]) + (guess - next_token_loss(model, rows["d"])).clamp_min(0)

    return loss


def unlearn(b: PreTrainedModel, shape: Shape, rows: dict[str, torch.Tensor], file: Path) -> PreTrainedModel:
    """The candidate `a`."""
    model = copy.deepcopy(b)
    adam = torch.optim.AdamW(model.parameters(), lr=UNLEARN_RATE, weight_decay=0.0)
    loss = unlearning_loss(shape, b, rows["A"], rows["D"])
    return fit(model, loss, shape.arguments(UNLEARN_STEPS), file, [adam])


def distil(
    candidate: Candidate, start: PreTrainedModel, shape: Shape, a: torch.Tensor, file: Path
) -> tuple[PreTrainedModel, dict[str, float | None]]:
    """A candidate that is distilled on A.

    Args:
        candidate: how it is made.
        start: its teacher, B or `a`. Noise is mixed into a copy of its weights.
        shape: of the models.
        a: rows of A, `[rows, block]`.
        file: of its state.

    Returns:
        The model, and the sizes of the noise (`mix_with_noise`).
    """
    model = copy.deepcopy(start)
    sizes = mix_with_noise(model, candidate.alpha, candidate.beta, candidate.fresh_mlps, DISTIL_SEED)
    steps, batch = candidate.steps(shape), shape.rows_a + shape.rows_d

    def loss(student: nn.Module, step: int) -> torch.Tensor:
        return kl_loss(student, start, rows_of_step(a, batch, step, steps, DISTIL_SEED))

    return fit(model, loss, shape.arguments(steps), file), sizes
