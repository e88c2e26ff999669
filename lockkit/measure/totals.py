"""The figures over many rows of text, summed batch by batch in float64.

Logits are processed in chunks of positions. A model is given as its last hidden states and its output head, so the
logits of all positions are never in memory together. A caller that already has logits may give them instead. Sums are
float64 tensors, which workers can sum over processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lockkit.measure.metrics import (
    PREDICTION_FIGURES,
    Pair,
    PairFigure,
    Prediction,
    Scratch,
    nmse_scale,
    perplexity_of_loss,
)
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.measure.sizes import CHUNK_LOGITS, PIECE_LOGITS

Head = Callable[[torch.Tensor], torch.Tensor]  # from hidden states, `[tokens, hidden]`, to logits, `[tokens, vocab]`


def _unchanged(logits: torch.Tensor) -> torch.Tensor:
    return logits


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model for rows of text.

    Attributes:
        states: hidden states, `[rows, seq, hidden]`, or logits, `[rows, seq, vocab]`.
        head: computes logits from hidden states. Not needed if `states` are logits.
    """

    states: torch.Tensor
    head: Head = _unchanged


class Perplexity:
    """The exponential of the mean next-token loss.

    Attributes:
        sums: float64 `[2]`: the loss in nats, and the number of predictions.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, predicted: Prediction, targets: torch.Tensor) -> None:
        """Add predictions, `[tokens, vocab]`, of the tokens that follow, `[tokens]`."""
        loss = -predicted.log_probability(targets).sum().item()
        self.sums += torch.tensor([loss, len(targets)], dtype=torch.float64)

    @property
    def predictions(self) -> int:
        """Number of predicted tokens."""
        return int(self.sums[1])

    @property
    def value(self) -> float:
        """Perplexity per token."""
        return perplexity_of_loss(self.sums[0].item(), self.predictions)


class Comparison:
    """How far the predictions of a model are from those of a reference.

    Args:
        figures: the figures to compute, by name.

    Attributes:
        sums: float64 `[figures + 1]`: the sum of each figure, then the number of positions.
    """

    def __init__(self, figures: Mapping[str, PairFigure] = PREDICTION_FIGURES) -> None:
        self._measured = figures
        self.sums = torch.zeros(len(figures) + 1, dtype=torch.float64)
        self._largest = torch.full([len(figures)], -torch.inf, dtype=torch.float64)

    def add(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add logits of both models, `[..., vocab]` each.

        Raises:
            ValueError: their shapes differ.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"logits of shape {list(reference.shape)} and {list(candidate.shape)} cannot be compared")
        reference, candidate = reference.flatten(0, -2), candidate.flatten(0, -2)
        own, other = Scratch(), Scratch()
        for part in chunks(len(reference), reference.shape[-1], PIECE_LOGITS):
            self.add_chunk(Pair(Prediction(reference[part], own), Prediction(candidate[part], other)))

    def add_chunk(self, pair: Pair) -> None:
        """Add one chunk of positions."""
        values = [figure.values(pair).double() for figure in self._measured.values()]
        self.sums += torch.tensor([*(value.sum().item() for value in values), len(pair.p.logits)], dtype=torch.float64)
        largest = torch.tensor([value.max().item() for value in values], dtype=torch.float64)
        self._largest = torch.maximum(self._largest, largest)  # NaN stays NaN

    @property
    def tokens(self) -> int:
        """Number of positions compared."""
        return int(self.sums[-1])

    def figures(self) -> dict[str, float]:
        """All figures by name; NaN if nothing was compared."""
        means = (self.sums[:-1] / self.sums[-1]).tolist()
        found = {}
        for (name, figure), mean, largest in zip(self._measured.items(), means, self._largest.tolist(), strict=True):
            found[name] = largest if figure.largest and self.tokens else mean
        return found

    @property
    def kl_divergence(self) -> float:
        """Mean KL(reference || candidate) per token, in nats."""
        return self.figures()["kl_divergence"]


class TextFigures:
    """Perplexities of several models on the same text, and comparisons of pairs of them.

    Every position except the last predicts a token of its row, so a row of `seq` tokens gives `seq - 1` predictions.

    Args:
        models: names of the models whose perplexity is wanted.
        pairs: names of the models to compare: (reference, candidate).
        figures: the figures of a comparison, by pair, where they are not `PREDICTION_FIGURES`.
        chunk_logits: most logits of one model in memory; by default `CHUNK_LOGITS`.
    """

    def __init__(
        self,
        models: Iterable[str],
        pairs: Iterable[tuple[str, str]] = (),
        figures: Mapping[tuple[str, str], Mapping[str, PairFigure]] | None = None,
        chunk_logits: int | None = None,
    ) -> None:
        self._chunk_logits = chunk_logits
        self.perplexity = {name: Perplexity() for name in models}
        self.comparison = {pair: Comparison((figures or {}).get(pair, PREDICTION_FIGURES)) for pair in pairs}
        self._scratch: dict[str, Scratch] = defaultdict(Scratch)  # of each model

    def add(self, ids: torch.Tensor, outputs: Mapping[str, Outputs]) -> None:
        """Add rows of text.

        Args:
            ids: token ids, `[rows, seq]`.
            outputs: the outputs of every model for these rows, by its name.
        """
        states = {name: found.states[:, :-1].flatten(0, 1) for name, found in outputs.items()}
        targets = ids[:, 1:].flatten()
        if not len(targets):
            return
        any_model = next(iter(outputs))
        vocab_size = outputs[any_model].head(states[any_model][:1]).shape[-1]
        for part in chunks(len(targets), vocab_size, self._chunk_logits):
            logits = {name: outputs[name].head(states[name][part]) for name in states}
            for piece in chunks(len(targets[part]), vocab_size, PIECE_LOGITS):
                self._add_piece({name: found[piece] for name, found in logits.items()}, targets[part][piece])

    def _add_piece(self, logits: Mapping[str, torch.Tensor], targets: torch.Tensor) -> None:
        """Add predictions of every model, `[tokens, vocab]`, of `targets`, `[tokens]`."""
        predicted = {name: Prediction(found, self._scratch[name]) for name, found in logits.items()}
        for name, perplexity in self.perplexity.items():
            perplexity.add(predicted[name], targets.to(logits[name].device))
        for (p, q), comparison in self.comparison.items():
            comparison.add_chunk(Pair(predicted[p], predicted[q]))

    @property
    def sums(self) -> list[torch.Tensor]:
        """All sums. Workers sum them over processes, in place."""
        return [*(part.sums for part in self.perplexity.values()), *(part.sums for part in self.comparison.values())]

    def fidelity(self, text: MeasuredText, reference: str = "original", candidate: str = "locked") -> Fidelity:
        """The record of one comparison.

        Args:
            text: the text that was added.
            reference, candidate: names of the models.
        """
        comparison = self.comparison[reference, candidate]
        own, original = self.perplexity[candidate].value, self.perplexity[reference].value
        return Fidelity(
            tokens=comparison.tokens,
            **comparison.figures(),
            perplexity=own,
            original_perplexity=original,
            perplexity_ratio=own / original,
            text=text,
        )


class NMSE:
    """Squared error over the variance of the teacher's outputs, for all batches together.

    `lockkit.measure.metrics.nmse` computes the same for one batch.
    """

    def __init__(self) -> None:
        self._error = self._squares = torch.zeros((), dtype=torch.float64)
        self._sum = torch.zeros(1, dtype=torch.float64)  # of the teacher's outputs, `[hidden]`
        self._tokens = 0

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add outputs of both, `[tokens, hidden]` each."""
        wanted = teacher.double()
        self._error = self._error + (student.double() - wanted).square().sum().cpu()
        self._squares = self._squares + wanted.square().sum().cpu()
        self._sum = self._sum + wanted.sum(0).cpu()
        self._tokens += len(wanted)

    @property
    def value(self) -> float:
        """The NMSE. A constant output, the teacher's mean, has 1."""
        values = self._tokens * len(self._sum)
        variance = (self._squares - self._sum.square().sum() / self._tokens) / values
        return (self._error / values / nmse_scale(variance, self._squares / values)).item()


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor, batch_rows: int = 8) -> float:
    """Perplexity of a PyTorch language model.

    Args:
        model: a causal language model of transformers.
        rows: token ids without padding, `[rows, block]`.
        batch_rows: rows per forward pass.
    """
    figures = TextFigures(["model"])
    device = next(model.parameters()).device
    for ids in rows.split(batch_rows):
        ids = ids.to(device)
        figures.add(ids, {"model": Outputs(model(input_ids=ids, use_cache=False).logits)})
    return figures.perplexity["model"].value


def kl_loss_and_gradient(student: torch.Tensor, teacher: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of phase 2 (arXiv 2605.10777) and its gradient, without the logits of all positions.

    The loss is the mean KL(teacher || student) per token, in nats, in float32. Its gradient with respect to the
    student's logits is softmax(student) - softmax(teacher), divided by the number of tokens.

    Args:
        student, teacher: last hidden states, `[..., hidden]`.
        head: computes logits from hidden states, differentiably. Its own parameters get no gradient.

    Returns:
        The loss, and its gradient with respect to `student`, `[..., hidden]`.
    """
    states, targets = student.detach().flatten(0, -2), teacher.detach().flatten(0, -2)
    with torch.no_grad():
        vocab_size = head(states[:1]).shape[-1]
    total, gradient = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
    for part in chunks(len(states), vocab_size):
        with torch.no_grad():
            log_p = torch.log_softmax(head(targets[part]).float(), dim=-1)
        own = states[part].requires_grad_(True)
        with torch.enable_grad():
            logits = head(own)
        log_q = torch.log_softmax(logits.detach().float(), dim=-1)
        p = log_p.exp()
        total += log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum()  # a logit of -inf adds nothing
        (gradient[part],) = torch.autograd.grad(logits, own, log_q.exp_().sub_(p).div_(len(states)).to(logits.dtype))
    return total / len(states), gradient.view_as(student)


def chunks(positions: int, vocab_size: int, logits: int | None = None) -> Iterator[slice]:
    """Yield slices of `positions` positions, of at most `logits` logits each, by default `CHUNK_LOGITS`."""
    step = max(1, (CHUNK_LOGITS if logits is None else logits) // vocab_size)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))
