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

_FEWEST_IN_A_GROUP, _MOST_IN_A_GROUP = 32, 512  # values in a group of `_argmax`
CONSTANT_SHARE = 1e-10  # the variance of constant outputs is below this share of their mean square


class Scratch:
    """Memory for temporaries in float64, used again by whoever takes the same name. It grows to the largest that was taken.

    Where the vocabulary is large, asking the system for new memory takes longer than computing with it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and device of `like`, and any content. It is valid until `name` is taken again."""
        kept = self._kept.get(name)
        if kept is None or kept.device != like.device or kept.numel() < like.numel():
            kept = self._kept[name] = torch.empty(like.numel(), dtype=torch.float64, device=like.device)
        return kept[: like.numel()].view(like.shape)


class Prediction:
    """The next-token distributions that a model predicts, and what several figures need of them, each computed once.

    A probability is `weights / total`. Its logarithm is `shifted - total.log()`. That is a softmax in single steps, which
    take half as long as PyTorch's own where the vocabulary is large.

    Args:
        logits: `[..., vocab]`.
        scratch: where the temporaries are. Nothing else may use it while this prediction is needed.
    """

    def __init__(self, logits: torch.Tensor, scratch: Scratch | None = None) -> None:
        self.logits, self.scratch = logits, scratch or Scratch()

    @functools.cached_property
    def shifted(self) -> torch.Tensor:
        """The logits minus the highest one, float64 `[..., vocab]`."""
        highest = self.logits.amax(-1, keepdim=True)
        return self.scratch.take("shifted", self.logits).copy_(self.logits).sub_(highest)

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """exp of `shifted`, float64 `[..., vocab]`."""
        return torch.exp(self.shifted, out=self.scratch.take("weights", self.logits))

    @functools.cached_property
    def total(self) -> torch.Tensor:
        """The sum of `weights`, float64 `[...]`."""
        return self.weights.sum(-1)

    @functools.cached_property
    def top_token(self) -> torch.Tensor:
        """The first token with the highest logit, `[...]`, or the first whose logit is NaN."""
        return _argmax(self.logits)

    def log_probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability in nats of one token at each position, float64 `[...]`, given `tokens`, `[...]`."""
        return self.shifted.gather(-1, tokens[..., None])[..., 0] - self.total.log()


def _argmax(values: torch.Tensor) -> torch.Tensor:
    """`values.argmax(-1)`, which takes several times as long as a maximum: find the maximum's group, and look only there.

    Where the number of values has no divisor of a useful size, `argmax` does it.

    Args:
        values: `[..., n]`.
    """
    size = next(size for size in range(_MOST_IN_A_GROUP, 0, -1) if values.shape[-1] % size == 0)
    if size < _FEWEST_IN_A_GROUP:
        return values.argmax(-1)
    groups = values.unflatten(-1, (-1, size))
    group = groups.amax(-1).argmax(-1, keepdim=True)
    within = groups.gather(-2, group[..., None].expand(*group.shape, size))[..., 0, :]
    return group[..., 0] * size + within.argmax(-1)


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of the next-token distributions, in nats, at each position.

    Args:
        reference, candidate: logits, `[..., vocab]`.

    Returns:
        float64 `[...]`, never below 0.
    """
    return kl_of_predictions(Prediction(reference), Prediction(candidate))


def kl_of_predictions(p: Prediction, q: Prediction) -> torch.Tensor:
    """KL(p || q) in nats at each position, float64 `[...]`. Never below 0."""
    terms = torch.sub(p.shifted, q.shifted, out=p.scratch.take("terms", p.logits)).mul_(p.weights)
    total = terms.sum(dim=-1)
    if total.isnan().any():
        # A token of probability 0 (logit -inf) in the reference adds nothing. A weight of NaN stays NaN.
        total = terms.masked_fill_(p.weights == 0, 0).sum(dim=-1)
    return (total / p.total + (q.total / p.total).log()).clamp_min(0)


def top1_agreement(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Whether the most likely token is the same in both logits, `[..., vocab]`: bool `[...]`.

    It is not where a logit is NaN, or the distribution is undefined: a logit of +inf, or all of them -inf.
    """
    return same_top_token(Prediction(reference), Prediction(candidate))


def same_top_token(p: Prediction, q: Prediction) -> torch.Tensor:
    """`top1_agreement` of two predictions."""
    return (p.top_token == q.top_token) & ~(p.total.isnan() | q.total.isnan())


def absolute_difference(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """|reference - candidate|, element by element, in their own dtype. Equal infinities differ by 0."""
    difference = (reference - candidate).abs_()
    return difference.masked_fill_(reference == candidate, 0) if difference.sum().isnan() else difference


@dataclass(frozen=True)
class Pair:
    """The predictions of two models at the same positions, each `[tokens, vocab]`.

    Attributes:
        p, q: of the reference and of the candidate.
    """

    p: Prediction
    q: Prediction

    @functools.cached_property
    def difference(self) -> torch.Tensor:
        """`absolute_difference` of the logits, which two figures need."""
        return absolute_difference(self.p.logits, self.q.logits)


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
    "kl_divergence": PairFigure(lambda pair: kl_of_predictions(pair.p, pair.q)),
    "top1_agreement": PairFigure(lambda pair: same_top_token(pair.p, pair.q)),
}
# Figures of two implementations of one model, whose logits should be equal.
LOGIT_FIGURES: Mapping[str, PairFigure] = {
    "max_difference": PairFigure(lambda pair: pair.difference.amax(-1), largest=True),
    "mean_difference": PairFigure(lambda pair: pair.difference.float().mean(-1)),
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
