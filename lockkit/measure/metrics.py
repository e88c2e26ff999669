"""What is measured of logits, as plain functions: one definition of each figure.

All but the two training losses compute in float64 from the logits as given. NaN is never hidden: it
passes into the mean, and a position with NaN logits never counts as an agreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of the next-token probabilities, float64 `[..., vocab]`."""
    return torch.log_softmax(logits.double(), dim=-1)


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of the next-token distributions, in nats.

    Both are logits, `[..., vocab]`; the result is float64, `[...]`, and never below 0.
    """
    return kl_of_log_probabilities(log_probabilities(reference), log_probabilities(candidate))


def kl_of_log_probabilities(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, `[...]`, of `log_probabilities`, `[..., vocab]`; never below 0."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p)
    # A token that the reference rules out (logit -inf) adds nothing; p = NaN stays NaN.
    return terms.masked_fill_(p == 0, 0).sum(dim=-1).clamp_min(0)


def top1_agreement(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Whether both logits, `[..., vocab]`, have the same highest token: bool, `[...]`."""
    nan = reference.isnan().any(dim=-1) | candidate.isnan().any(dim=-1)
    return (reference.argmax(dim=-1) == candidate.argmax(dim=-1)) & ~nan


def absolute_difference(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """|reference - candidate| in float64; equal infinities differ by 0."""
    difference = (reference.double() - candidate.double()).abs()
    return torch.where(reference == candidate, torch.zeros_like(difference), difference)


class Pair(NamedTuple):
    """What two models predict at a few positions: logits, and their `log_probabilities`; each `[tokens, vocab]`."""

    p: torch.Tensor  # of the reference
    q: torch.Tensor  # of the candidate
    log_p: torch.Tensor
    log_q: torch.Tensor


@dataclass(frozen=True)
class PairFigure:
    """A figure of two models: its value at each position, `[tokens]`, and whether the mean or the largest is told."""

    values: Callable[[Pair], torch.Tensor]
    largest: bool = False


# Of two models' predictions, by the names they have in every result.
PREDICTION_FIGURES: Mapping[str, PairFigure] = {
    "kl_divergence": PairFigure(lambda pair: kl_of_log_probabilities(pair.log_p, pair.log_q)),
    "top1_agreement": PairFigure(lambda pair: top1_agreement(pair.p, pair.q)),
}
# Of two implementations of one model, whose logits themselves should be equal.
LOGIT_FIGURES: Mapping[str, PairFigure] = {
    "max_difference": PairFigure(lambda pair: absolute_difference(pair.p, pair.q).amax(-1), largest=True),
    "mean_difference": PairFigure(lambda pair: absolute_difference(pair.p, pair.q).mean(-1)),
    **PREDICTION_FIGURES,
}


def perplexity_of_loss(total: float, predictions: int) -> float:
    """exp(total / predictions); infinite where that overflows, NaN without predictions."""
    try:
        return math.exp(total / predictions) if predictions else math.nan
    except OverflowError:
        return math.inf


def mean_kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, averaged over all tokens of `[..., vocab]` logits, in float32.

    The loss of phase 2 (arXiv 2605.10777), differentiable in `student`.
    """
    log_student = F.log_softmax(student.float().flatten(0, -2), dim=-1)
    log_teacher = F.log_softmax(teacher.float().flatten(0, -2), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def nmse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error over the variance of the teacher's outputs, `[..., tokens, hidden]` to `[...]`.

    The loss of phase 1 (arXiv 2605.10777), differentiable in `student`, in the inputs' own type.
    """
    centred = teacher - teacher.mean(-2, keepdim=True)
    return (student - teacher).square().mean((-2, -1)) / centred.square().mean((-2, -1))
