"""Each figure as a plain function of logits, defined once.

All except differences of logits and the training loss `nmse` compute in float64. NaN is not hidden: it passes into the
mean, and a position with NaN logits never counts as an agreement.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CONSTANT_SHARE = 1e-10  # the variance of constant outputs is below this share of their mean square


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, float64 `[..., vocab]`, from logits of the same shape."""
    return torch.log_softmax(logits.double(), dim=-1)


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of the next-token distributions, in nats, at each position.

    Args:
        reference, candidate: logits, `[..., vocab]`.

    Returns:
        float64 `[...]`, never below 0.
    """
    return kl_of_log_probabilities(log_probabilities(reference), log_probabilities(candidate))


def kl_of_log_probabilities(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, float64 `[...]`, of two `log_probabilities`, `[..., vocab]`. Never below 0."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p)
    total = terms.sum(dim=-1)
    if total.isnan().any():
        # A token of probability 0 (logit -inf) in the reference adds nothing. p = NaN stays NaN.
        total = terms.masked_fill_(p == 0, 0).sum(dim=-1)
    return total.clamp_min(0)


def top1_agreement(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Whether the most likely token is the same in both logits, `[..., vocab]`: bool `[...]`."""
    (highest, token), (other_highest, other_token) = reference.max(dim=-1), candidate.max(dim=-1)
    return (token == other_token) & ~(highest.isnan() | other_highest.isnan())  # a maximum is NaN if any logit is


def absolute_difference(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """|reference - candidate|, element by element, in their own dtype. Equal infinities differ by 0."""
    difference = (reference - candidate).abs()
    return difference.masked_fill_(reference == candidate, 0) if difference.sum().isnan() else difference


@dataclass(frozen=True)
class Pair:
    """The predictions of two models at the same positions, each `[tokens, vocab]`.

    Attributes:
        p, q: logits of the reference and of the candidate.
        log_p, log_q: their `log_probabilities`.
    """

    p: torch.Tensor
    q: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor

    @functools.cached_property
    def difference(self) -> torch.Tensor:
        """`absolute_difference` of the logits, which two figures need."""
        return absolute_difference(self.p, self.q)


@dataclass(frozen=True)
class PairFigure:
    """A figure that compares two models.

    Attributes:
        values: its value at each position, `[tokens]`.
        largest: report the largest value instead of the mean.
    """

    values: Callable[[Pair], torch.Tensor]
    largest: bool = False


# Figures of any two models, by their name in every result.
PREDICTION_FIGURES: Mapping[str, PairFigure] = {
    "kl_divergence": PairFigure(lambda pair: kl_of_log_probabilities(pair.log_p, pair.log_q)),
    "top1_agreement": PairFigure(lambda pair: top1_agreement(pair.p, pair.q)),
}
# Figures of two implementations of one model, whose logits should be equal.
LOGIT_FIGURES: Mapping[str, PairFigure] = {
    "max_difference": PairFigure(lambda pair: pair.difference.amax(-1), largest=True),
    "mean_difference": PairFigure(lambda pair: pair.difference.mean(-1, dtype=torch.float64)),
    **PREDICTION_FIGURES,
}


def perplexity_of_loss(total: float, predictions: int) -> float:
    """exp(`total` / `predictions`), where `total` is the sum of the losses in nats.

    Infinite where that overflows; NaN without predictions.
    """
    try:
        return math.exp(total / predictions) if predictions else math.nan
    except OverflowError:
        return math.inf


def nmse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Normalised mean squared error: mean squared error over the variance of the teacher's outputs (`nmse_scale`).

    The loss of phase 1 (arXiv 2605.10777). It is computed in the dtype of the inputs.

    Args:
        student: outputs, `[..., tokens, hidden]`. The result is differentiable with respect to them.
        teacher: outputs of the same shape.

    Returns:
        `[...]`.
    """
    centred = teacher - teacher.mean(-2, keepdim=True)
    scale = nmse_scale(centred.square().mean((-2, -1)), teacher.square().mean((-2, -1)))
    return (student - teacher).square().mean((-2, -1)) / scale


def nmse_scale(variance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """What an NMSE divides by: the variance of the teacher's outputs.

    Outputs that are constant have no variance besides that of rounding. Their mean square takes its place, and 1 that of
    outputs that are all zero. So the NMSE of an exact copy is always 0.

    Args:
        variance, mean_square: of the teacher's outputs, `[...]`.
    """
    scale = torch.where(variance > CONSTANT_SHARE * mean_square, variance, mean_square)
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
