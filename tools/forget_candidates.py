"""The candidates of forget_bench.py: models made from B that should no longer hold what D taught it.

* `a`: unlearning in weight space by gradient difference (Liu et al. 2022, arXiv 2203.12817): B's predictions on A are kept, the
  loss on D rises to that of a guess, and beyond. A baseline that is known to be weak.
* `a-uniform`: the same, but the predictions on D become even ones. So the loss on D does not rise beyond a guess.
* `b`: lockkit's ordinary lock of B, distilled on A: chains from B's MLPs.
* `c`: the MLPs drawn anew, the rest of B kept; then distilled from B on A.
* `d`: the MLPs drawn anew, all other weights mixed with noise; then distilled from B on A. After unlearn-noise-distil (UNDO,
  arXiv 2506.06278), without its first step.
* `e`: as `d`, from `a-uniform` instead of B, which is the teacher, too.
* `undo`: UNDO with the paper's noise: from `a-uniform`, all weights mixed with noise of a tenth of the usual size.
* `f`: from `a-uniform`, the last half of the layers drawn anew, the rest kept.

A name may end in tokens of distillation over B's training tokens: `d-0.8@2`. Without, they are 0.6.

Here the MLPs of all but `b` are plain ones: whether a capability is absent depends on what they are distilled on, not on their
form. A lock of the result has the form.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
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

DISTIL_SEED = 1  # another order of A's rows than in pretraining; the seed of the models is added


@dataclass(frozen=True)
class Unlearning:
    """How an unlearned model is made.

    Attributes:
        uniform: even predictions on D are asked for, instead of a high loss.
        steps: of AdamW.
        rate: its peak.
        rows_a, rows_d: rows of A and of D in a step.
    """

    uniform: bool = False
    steps: int = 48
    rate: float = 1e-3
    rows_a: int = 4
    rows_d: int = 4


UNLEARNED = {"a": Unlearning(), "a-uniform": Unlearning(uniform=True, steps=192, rows_a=8, rows_d=2)}


@dataclass(frozen=True)
class Candidate:
    """How a candidate is made.

    Attributes:
        teacher: `B` or an unlearned model. It starts from this one, too.
        fresh_mlps: the MLPs are noise alone.
        fresh_layers: share of the layers that are noise alone, the last ones.
        alpha: share of noise in all other weights; 0 keeps them.
        beta: size of the noise, over that of a usual initialisation.
        distilled: tokens of distillation over B's training tokens.
    """

    teacher: str = "B"
    fresh_mlps: bool = True
    fresh_layers: float = 0.0
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
    "e-0.6": Candidate("a-uniform", alpha=0.6),
    "e-0.8": Candidate("a-uniform", alpha=0.8),
    "undo": Candidate("a-uniform", fresh_mlps=False, alpha=0.6, beta=0.1),
    "f": Candidate("a-uniform", fresh_mlps=False, fresh_layers=0.5),
}


def candidate_of(name: str) -> Candidate | None:
    """The candidate of a name such as `d-0.8` or `d-0.8@2`; None for B, G, those of unlearning and `b`.

    Raises:
        ValueError: there is none of this name.
    """
    base, _, distilled = name.partition("@")
    if base in CANDIDATES:
        return replace(CANDIDATES[base], distilled=float(distilled)) if distilled else CANDIDATES[base]
    if name in ("B", "G", "b", *UNLEARNED):
        return None
    raise ValueError(f"no candidate {name!r}")


def noise_like(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of a usual initialisation: Xavier's for a matrix (Glorot and Bengio 2010), ones for the gains of a norm."""
    if parameter.ndim < 2:
        return torch.ones_like(parameter)
    std = math.sqrt(2 / (parameter.shape[0] + parameter.shape[1]))
    return std * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def mix_with_noise(model: PreTrainedModel, candidate: Candidate, seed: int) -> dict[str, float | None]:
    """Replace each weight w by (1 - alpha) w + alpha beta noise, in place; gains of norms move towards 1 instead of beta.

    Args:
        model: of transformers.
        candidate: alpha and beta. Both are 1 for what it draws anew.
        seed: of the noise.

    Returns:
        The rms of the noise over that of what is left of the matrices, outside the MLPs and in them; None if nothing
        is left.
    """
    generator = torch.Generator().manual_seed(seed)
    squares = {True: [0.0, 0.0], False: [0.0, 0.0]}  # in the MLPs or not: of the noise, of the rest
    layers = model.config.num_hidden_layers
    kept = round(layers * (1 - candidate.fresh_layers))
    fresh_layers = tuple(f"layers.{index}." for index in range(kept, layers))
    for name, parameter in model.named_parameters():
        in_mlp = ".mlp." in name
        fresh = (in_mlp and candidate.fresh_mlps) or any(layer in name for layer in fresh_layers)
        share, size = (1.0, 1.0) if fresh else (candidate.alpha, candidate.beta)
        noise, left = share * noise_like(parameter, generator), (1 - share) * parameter
        if parameter.ndim >= 2:
            noise = size * noise
            squares[in_mlp][0] += noise.square().sum().item()
            squares[in_mlp][1] += left.square().sum().item()
        parameter.copy_(left + noise)
    return {
        name: math.sqrt(noise / left) if left else None
        for name, (noise, left) in (("outside", squares[False]), ("MLPs", squares[True]))
    }


def unlearning_loss(
    how: Unlearning, shape: Shape, teacher: PreTrainedModel, a: torch.Tensor, d: torch.Tensor
) -> LossOf:
    """KL to the teacher on A; and on D what the loss is below that of a guess, or KL(even predictions || model)."""
    guess = math.log(teacher.config.vocab_size)

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        kept = kl_loss(model, teacher, rows_of_step(a, how.rows_a, step, how.steps, shape.seed))
        forgotten = rows_of_step(d, how.rows_d, step, how.steps, shape.seed)
        if not how.uniform:
            return kept + (guess - next_token_loss(model, forgotten)).clamp_min(0)
        logits = model(input_ids=forgotten, use_cache=False).logits
        return kept - logits.log_softmax(-1).mean() - guess

    return loss


def unlearn(
    how: Unlearning, b: PreTrainedModel, shape: Shape, rows: dict[str, torch.Tensor], file: Path
) -> PreTrainedModel:
    """An unlearned model, from B."""
    model = copy.deepcopy(b)
    adam = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.0)
    return fit(model, unlearning_loss(how, shape, b, rows["A"], rows["D"]), shape.arguments(how.steps), file, [adam])


def distil(
    candidate: Candidate, start: PreTrainedModel, shape: Shape, a: torch.Tensor, file: Path
) -> tuple[PreTrainedModel, dict[str, float | None]]:
    """A candidate that is distilled on A.

    Args:
        candidate: how it is made.
        start: its teacher. Noise is mixed into a copy of its weights.
        shape: of the models.
        a: rows of A, `[rows, block]`.
        file: of its state. Those that differ in `distilled` alone share a trunk beside it (`fit`).

    Returns:
        The model, and the sizes of the noise (`mix_with_noise`).
    """
    model, seed = copy.deepcopy(start), DISTIL_SEED + shape.seed
    sizes = mix_with_noise(model, candidate, seed)
    steps, batch = candidate.steps(shape), shape.rows_a + shape.rows_d
    arguments = shape.arguments(steps)

    def loss(student: nn.Module, step: int) -> torch.Tensor:
        return kl_loss(student, start, rows_of_step(a, batch, step, steps, seed))

    trunk = file.with_name(f"{file.stem.partition('@')[0]}-trunk-{arguments.warm_up}.pt")
    return fit(model, loss, arguments, file, trunk=trunk), sizes
