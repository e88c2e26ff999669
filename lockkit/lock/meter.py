"""How a model with chains compares with the original, one decoder layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lockkit.models.layered import StreamedModel, return_free_memory
from lockkit.workers import Workers

ROWS_IN_A_BATCH = 4
Chains = Callable[[int], nn.Module]  # from a layer's index to what stands in for its MLP


@dataclass(frozen=True)
class Fidelity:
    """How the chains compare with the MLPs on held-out rows; perplexities are per token."""

    kl_divergence: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.original_perplexity

    def record(self) -> dict:
        return asdict(self) | {"perplexity_ratio": self.perplexity_ratio}


def mean_kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, averaged over all tokens of `[..., vocab]` logits."""
    log_student = F.log_softmax(student.float().flatten(0, -2), dim=-1)
    log_teacher = F.log_softmax(teacher.float().flatten(0, -2), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@contextmanager
def mlp_replaced(layer: nn.Module, mlp: nn.Module) -> Iterator[None]:
    """Put `mlp` into a decoder layer for the length of a block."""
    own = layer.mlp
    layer.mlp = mlp
    try:
        yield
    finally:
        layer.mlp = own


class FidelityMeter:
    """Compares chains with the original on fixed rows; the original is run once.

    Args:
        stream: the original.
        rows: token ids `[rows, block]`; each worker takes a share of them.
    """

    def __init__(self, stream: StreamedModel, rows: torch.Tensor, workers: Workers | None = None):
        self.stream, self.workers = stream, workers or Workers()
        self.tokens = len(rows) * (rows.shape[1] - 1)
        self.batches = list(rows.split(ROWS_IN_A_BATCH))[self.workers.rank :: self.workers.count]
        begun = [stream.begin(batch) for batch in self.batches]
        self.first = [hidden.cpu() for hidden, _ in begun]
        self.arguments = {len(hidden): arguments for hidden, arguments in begun}
        self.original = self._last_hidden(None)

    @torch.no_grad()
    def _last_hidden(self, chains: Chains | None) -> list[torch.Tensor]:
        hidden = list(self.first)
        for index in range(len(self.stream)):
            with self.stream.layer(index) as layer, mlp_replaced(layer, chains(index) if chains else layer.mlp):
                for number, value in enumerate(hidden):
                    arguments = self.arguments[len(value)][index]
                    hidden[number] = layer(value.to(self.stream.device), **arguments).cpu()
        return hidden

    @torch.no_grad()
    def measure(self, chains: Chains) -> Fidelity:
        """Fidelity of the model with `chains(layer)` in place of each MLP."""
        totals = torch.zeros(4, dtype=torch.float64)
        for ids, own, student in zip(self.batches, self.original, self._last_hidden(chains), strict=True):
            ids = ids.to(self.stream.device)
            totals += _compare(
                self.stream.logits(ids, own.to(self.stream.device))[:, :-1],
                self.stream.logits(ids, student.to(self.stream.device))[:, :-1],
                ids[:, 1:].flatten(),
            )
        return_free_memory()
        self.workers.sum_([totals])
        kl, agreement, loss, original_loss = (totals / self.tokens).tolist()
        return Fidelity(kl, agreement, _exp(loss), _exp(original_loss))


def _compare(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over tokens: KL, equal top tokens, the student's loss, the teacher's loss."""
    return torch.tensor(
        [
            mean_kl_divergence(student, teacher).item() * targets.numel(),
            (student.argmax(-1) == teacher.argmax(-1)).sum().item(),
            F.cross_entropy(student.float().flatten(0, 1), targets, reduction="sum").item(),
            F.cross_entropy(teacher.float().flatten(0, 1), targets, reduction="sum").item(),
        ],
        dtype=torch.float64,
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
