"""The figures over many rows of text, added up batch by batch in float64.

Logits are computed and looked at a chunk of positions at a time. A model is given as its last hidden
states and its output head, so that the logits of all positions need not exist at once; a caller who
has logits gives those. The sums of each class are in float64 tensors, which workers can add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lockkit.measure.metrics import (
    PREDICTION_FIGURES,
    Pair,
    PairFigure,
    log_probabilities,
    perplexity_of_loss,
)
from lockkit.measure.records import Fidelity, MeasuredText

# Logits looked at together, of one model: 16 MB in float32, and 32 MB for each temporary in float64.
CHUNK_LOGITS = 4_000_000

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states `[tokens, hidden]` to logits `[tokens, vocab]`


def _unchanged(logits: torch.Tensor) -> torch.Tensor:
    return logits


@dataclass(frozen=True)
class Outputs:
    """What a model computed for rows of text.

    Attributes:
        states: hidden states, `[rows, seq, hidden]`; or logits, `[rows, seq, vocab]`.
        head: from hidden states to logits; not given where `states` are logits.
    """

    states: torch.Tensor
    head: Head = _unchanged


class Perplexity:
    """The exponential of the mean next-token loss."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)  # loss, predictions

    def add(self, log_p: torch.Tensor, targets: torch.Tensor) -> None:
        """Add predictions: `log_probabilities`, `[tokens, vocab]`, and the tokens that followed, `[tokens]`."""
        loss = -log_p.gather(-1, targets[:, None]).sum().item()
        self.sums += torch.tensor([loss, len(targets)], dtype=torch.float64)

    @property
    def predictions(self) -> int:
        """How many tokens were predicted."""
        return int(self.sums[1])

    @property
    def value(self) -> float:
        """The perplexity per token."""
        return perplexity_of_loss(self.sums[0].item(), self.predictions)


class Comparison:
    """How far one model's predictions are from a reference's.

    Args:
        figures: what is measured, by name.
    """

    def __init__(self, figures: Mapping[str, PairFigure] = PREDICTION_FIGURES) -> None:
        self._measured = figures
        self.sums = torch.zeros(len(figures) + 1, dtype=torch.float64)  # of each figure, then positions
        self._largest = torch.full([len(figures)], -torch.inf, dtype=torch.float64)

    def add(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add two sets of logits of the same shape, `[..., vocab]`."""
        if reference.shape != candidate.shape:
            raise ValueError(f"logits of shape {list(reference.shape)} and {list(candidate.shape)} cannot be compared")
        reference, candidate = reference.flatten(0, -2), candidate.flatten(0, -2)
        for part in chunks(len(reference), reference.shape[-1]):
            p, q = reference[part], candidate[part]
            self.add_chunk(Pair(p, q, log_probabilities(p), log_probabilities(q)))

    def add_chunk(self, pair: Pair) -> None:
        """Add a few positions."""
        values = [figure.values(pair).double() for figure in self._measured.values()]
        self.sums += torch.tensor([*(value.sum().item() for value in values), len(pair.p)], dtype=torch.float64)
        largest = torch.tensor([value.max().item() for value in values], dtype=torch.float64)
        self._largest = torch.maximum(self._largest, largest)  # keeps a NaN

    @property
    def tokens(self) -> int:
        """How many positions were compared."""
        return int(self.sums[-1])

    def figures(self) -> dict[str, float]:
        """All figures by name; NaN where nothing was compared."""
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
    """Perplexities of several models on the same text, and comparisons of some of them.

    Every position that predicts a token of its row counts: all but the last. So a row of `seq` tokens
    gives `seq - 1` predictions.

    Args:
        models: names of the models.
        pairs: (reference, candidate) by name.
    """

    def __init__(self, models: Iterable[str], pairs: Iterable[tuple[str, str]] = ()) -> None:
        self.perplexity = {name: Perplexity() for name in models}
        self.comparison = {pair: Comparison() for pair in pairs}

    def add(self, ids: torch.Tensor, outputs: Mapping[str, Outputs]) -> None:
        """Add rows of token ids, `[rows, seq]`, with what every model computed for them."""
        states = {name: found.states[:, :-1].flatten(0, 1) for name, found in outputs.items()}
        targets = ids[:, 1:].flatten()
        if not len(targets):
            return
        any_model = next(iter(outputs))
        vocab_size = outputs[any_model].head(states[any_model][:1]).shape[-1]
        for part in chunks(len(targets), vocab_size):
            logits = {name: outputs[name].head(states[name][part]) for name in states}
            logs = {name: log_probabilities(found) for name, found in logits.items()}
            for name, perplexity in self.perplexity.items():
                perplexity.add(logs[name], targets[part].to(logs[name].device))
            for (p, q), comparison in self.comparison.items():
                comparison.add_chunk(Pair(logits[p], logits[q], logs[p], logs[q]))

    @property
    def sums(self) -> list[torch.Tensor]:
        """All sums, for workers to add up in place."""
        return [part.sums for part in (*self.perplexity.values(), *self.comparison.values())]

    def fidelity(self, text: MeasuredText, reference: str = "original", candidate: str = "locked") -> Fidelity:
        """The record of one comparison; `text` is what was added."""
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
    """Squared error over the variance of the teacher's outputs, over all batches together."""

    def __init__(self) -> None:
        self._error = self._squares = torch.zeros((), dtype=torch.float64)
        self._sum = torch.zeros(1, dtype=torch.float64)  # of the outputs, `[hidden]`
        self._tokens = 0

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add outputs, `[tokens, hidden]` each."""
        wanted = teacher.double()
        self._error = self._error + (student.double() - wanted).square().sum().cpu()
        self._squares = self._squares + wanted.square().sum().cpu()
        self._sum = self._sum + wanted.sum(0).cpu()
        self._tokens += len(wanted)

    @property
    def value(self) -> float:
        """The error of all batches; the teacher's mean scores 1."""
        variance = self._squares - self._sum.square().sum() / self._tokens
        return (self._error / variance.clamp_min(0)).item()


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor, batch_rows: int = 8) -> float:
    """Perplexity of a PyTorch language model over rows of token ids without padding.

    `rows` is `[rows, block]`, and `batch_rows` of them go through the model at a time.
    """
    figures = TextFigures(["model"])
    device = next(model.parameters()).device
    for ids in rows.split(batch_rows):
        ids = ids.to(device)
        figures.add(ids, {"model": Outputs(model(input_ids=ids, use_cache=False).logits)})
    return figures.perplexity["model"].value


def chunks(positions: int, vocab_size: int) -> Iterator[slice]:
    """Cut `positions` into parts of at most `CHUNK_LOGITS` logits."""
    step = max(1, CHUNK_LOGITS // vocab_size)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))
