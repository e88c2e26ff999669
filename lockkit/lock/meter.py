"""Measure how close a model with chains is to the original, with one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lockkit.lock.data import DistillationData
from lockkit.lock.sizes import ROWS_IN_A_BATCH
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.measure.totals import Outputs, TextFigures
from lockkit.models.identity import public_name
from lockkit.models.layered import StreamedModel, return_free_memory
from lockkit.progress import NoProgress, Progress
from lockkit.workers import Workers

Chains = Callable[[int], nn.Module]  # from the index of a layer to the module that replaces its MLP


@contextmanager
def mlp_replaced(layer: nn.Module, mlp: nn.Module) -> Iterator[None]:
    """Replace the MLP of a decoder layer inside the `with` block."""
    own = layer.mlp
    layer.mlp = mlp
    try:
        yield
    finally:
        layer.mlp = own


class FidelityMeter:
    """Compares models with the original on fixed rows. The original runs once.

    Args:
        stream: the original.
        rows: token ids, `[rows, block]`, the same on all workers. Each worker computes its share.
        text: description of the rows.
        workers: share the rows.
        progress: counts layers and batches.
    """

    def __init__(
        self,
        stream: StreamedModel,
        rows: torch.Tensor,
        text: MeasuredText,
        workers: Workers | None = None,
        progress: Progress | None = None,
    ):
        self.stream, self.text, self.workers = stream, text, workers or Workers()
        self.progress = progress or NoProgress()
        self.batches = list(rows.split(ROWS_IN_A_BATCH))[self.workers.rank :: self.workers.count]
        begun = [stream.begin(batch) for batch in self.batches]
        self.first = [hidden.cpu() for hidden, _ in begun]
        self.arguments = {len(hidden): arguments for hidden, arguments in begun}
        self.progress.start(f"original on {text}", len(stream))
        self.original = self._last_hidden(stream, self.first)
        self.progress.finish()

    @classmethod
    def on(
        cls,
        part: str,
        stream: StreamedModel,
        data: DistillationData,
        workers: Workers | None = None,
        progress: Progress | None = None,
    ) -> FidelityMeter:
        """A meter for one part of a lock's data: `validation` or `evaluation`."""
        rows = getattr(data, part)
        text = MeasuredText.of(rows, public_name(data.source), data.split(part))
        return cls(stream, rows, text, workers, progress)

    @torch.no_grad()
    def original_perplexity(self) -> float:
        """The original's perplexity on the rows."""
        figures = TextFigures(["original"])
        for ids, states in zip(self.batches, self.original, strict=True):
            outputs = {"original": Outputs(states.to(self.stream.device), self.stream.head)}
            figures.add(ids.to(self.stream.device), outputs)
        self.workers.sum_(figures.sums)
        return figures.perplexity["original"].value

    def measure(self, chains: Chains) -> Fidelity:
        """The fidelity of the original with the MLP of layer `i` replaced by `chains(i)`."""
        self.progress.start(f"locked on {self.text}", len(self.stream) + len(self.batches))
        return self._compare(self.stream, self._last_hidden(self.stream, self.first, chains))

    def measure_model(self, locked: StreamedModel) -> Fidelity:
        """The fidelity of a locked model with its own embeddings, attention and head."""
        self.progress.start(f"as written on {self.text}", len(locked) + len(self.batches))
        first = [locked.begin(batch)[0].cpu() for batch in self.batches]
        return self._compare(locked, self._last_hidden(locked, first))

    @torch.no_grad()
    def _last_hidden(
        self, stream: StreamedModel, first: list[torch.Tensor], chains: Chains | None = None
    ) -> list[torch.Tensor]:
        """The last layer's output for each batch, given the `first` layer's input; `[rows, block, hidden]` each."""
        hidden = list(first)
        for index in range(len(stream)):
            with stream.layer(index) as layer, mlp_replaced(layer, chains(index) if chains else layer.mlp):
                for number, value in enumerate(hidden):
                    arguments = self.arguments[len(value)][index]
                    hidden[number] = layer(value.to(stream.device), **arguments).cpu()
            self.progress.advance()
        return hidden

    @torch.no_grad()
    def _compare(self, locked: StreamedModel, states: list[torch.Tensor]) -> Fidelity:
        """Compare with the original. `states` has the last hidden states of `locked` for each batch."""
        device = self.stream.device
        figures = TextFigures(["original", "locked"], [("original", "locked")])
        for ids, own, student in zip(self.batches, self.original, states, strict=True):
            outputs = {
                "original": Outputs(own.to(device), self.stream.head),
                "locked": Outputs(student.to(device), locked.head),
            }
            figures.add(ids.to(device), outputs)
            self.progress.advance()
        return_free_memory()
        self.workers.sum_(figures.sums)
        fidelity = figures.fidelity(self.text)
        self.progress.finish(f"KL {fidelity.kl_divergence:.5f}, perplexity ratio {fidelity.perplexity_ratio:.4f}")
        return fidelity
