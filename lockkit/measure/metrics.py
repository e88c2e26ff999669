"""What verification measures, as plain functions of logits.

Everything is computed in float64 from the logits as given, a few positions at a time, so that
neither rounding nor a vocabulary of 150,000 tokens gets in the way. NaN is never hidden: it
passes into the mean, and a position with NaN logits never counts as an agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

# Logits looked at together; in float64 that is 32 MB for each of a handful of temporaries.
_CHUNK_ELEMENTS = 4_000_000


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference || candidate) of the next-token distributions, in nats.

    Both are logits, `[..., vocab]`; the result is float64, `[...]`, and never below 0.
    """
    log_p = torch.log_softmax(reference.double(), dim=-1)
    log_q = torch.log_softmax(candidate.double(), dim=-1)
    p = log_p.exp()
    # A token that the reference rules out (logit -inf) adds nothing; p = NaN stays NaN.
    terms = torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q))
    return terms.sum(dim=-1).clamp_min(0)


def top1_agreement(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Whether both logits, `[..., vocab]`, have the same highest token: bool, `[...]`."""
    nan = reference.isnan().any(dim=-1) | candidate.isnan().any(dim=-1)
    return (reference.argmax(dim=-1) == candidate.argmax(dim=-1)) & ~nan


def absolute_difference(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """|reference - candidate| in float64; equal infinities differ by 0."""
    difference = (reference.double() - candidate.double()).abs()
    return torch.where(reference == candidate, torch.zeros_like(difference), difference)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token given those before it, in nats.

    `logits` is `[batch, seq, vocab]`, `ids` `[batch, seq]`; the result is float64,
    `[batch, seq - 1]`: a row's first token is predicted from nothing and left out.
    """
    targets = ids[:, 1:].reshape(-1)
    losses = [
        torch.nn.functional.cross_entropy(part.double(), target, reduction="none")
        for part, target in _chunks(logits[:, :-1], targets)
    ]
    return torch.cat(losses).view(ids.shape[0], -1)


def perplexity(model: nn.Module, rows: torch.Tensor, batch_rows: int = 8) -> float:
    """Perplexity of a PyTorch language model over rows of token ids without padding.

    The exponential of the mean next-token loss over all `rows.numel() - len(rows)` predictions;
    `rows` is `[rows, block]`, and `batch_rows` of them go through the model at a time.
    """
    total = 0.0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(rows), batch_rows):
            ids = rows[start : start + batch_rows].to(device)
            total += next_token_loss(model(input_ids=ids, use_cache=False).logits, ids).sum().item()
    return perplexity_of_loss(total, rows.numel() - len(rows))


def perplexity_of_loss(total: float, predictions: int) -> float:
    """exp(total / predictions); infinite where that overflows, NaN without predictions."""
    try:
        return math.exp(total / predictions) if predictions else math.nan
    except OverflowError:
        return math.inf


class Perplexity:
    """Adds up next-token losses batch by batch."""

    def __init__(self) -> None:
        self.total = 0.0
        self.predictions = 0

    def add(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Add logits, `[batch, seq, vocab]`, for the tokens `ids`, `[batch, seq]`."""
        loss = next_token_loss(logits, ids)
        self.total += loss.sum().item()
        self.predictions += loss.numel()

    @property
    def value(self) -> float:
        return perplexity_of_loss(self.total, self.predictions)


class Comparison:
    """Adds up how far one model's logits are from a reference's, batch by batch."""

    def __init__(self) -> None:
        self.tokens = 0
        self.agreements = 0
        self.total_kl = 0.0
        self.total_difference = 0.0  # of means over the vocabulary
        self._max_difference = torch.zeros((), dtype=torch.float64)

    def add(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add two sets of logits of the same shape, `[..., vocab]`."""
        if reference.shape != candidate.shape:
            raise ValueError(f"logits of shape {list(reference.shape)} and {list(candidate.shape)} cannot be compared")
        flat_candidate = candidate.reshape(-1, candidate.shape[-1])
        for p, q in _chunks(reference, flat_candidate):
            difference = absolute_difference(p, q)
            self._max_difference = torch.maximum(self._max_difference, difference.max().cpu())  # keeps a NaN
            self.total_difference += difference.mean(dim=-1).sum().item()
            self.total_kl += kl_divergence(p, q).sum().item()
            self.agreements += int(top1_agreement(p, q).sum())
            self.tokens += len(p)

    @property
    def max_difference(self) -> float:
        return self._max_difference.item() if self.tokens else math.nan

    @property
    def mean_difference(self) -> float:
        return self._mean(self.total_difference)

    @property
    def kl_divergence(self) -> float:
        return self._mean(self.total_kl)

    @property
    def top1_agreement(self) -> float:
        return self._mean(self.agreements)

    def _mean(self, total: float) -> float:
        return total / self.tokens if self.tokens else math.nan


def _chunks(logits: torch.Tensor, beside: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut logits, `[..., vocab]`, and one entry beside each position into small pieces."""
    flat = logits.reshape(-1, logits.shape[-1])
    positions = max(1, _CHUNK_ELEMENTS // flat.shape[-1])
    return zip(flat.split(positions), beside.split(positions), strict=True)
