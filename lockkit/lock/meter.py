"""How a model with chains compares with the original, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lockkit.lock.data import DistillationData
from lockkit.measure.records import Fidelity, MeasuredText
from lockkit.measure.totals import Outputs, TextFigures
from lockkit.models.identity import public_name
from lockkit.models.layered import StreamedModel, return_free_memory
from lockkit.workers import Workers

ROWS_IN_A_BATCH = 4
Chains = Callable[[int], nn.Module]  # from a layer's index to what stands in for its MLP


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
        text: what the rows are.
    """

    def __init__(self, stream: StreamedModel, rows: torch.Tensor, text: MeasuredText, workers: Workers | None = None):
        self.stream, self.text, self.workers = stream, text, workers or Workers()
        self.batches = list(rows.split(ROWS_IN_A_BATCH))[self.workers.rank :: self.workers.count]
        begun = [stream.begin(batch) for batch in self.batches]
        self.first = [hidden.cpu() for hidden, _ in begun]
        self.arguments = {len(hidden): arguments for hidden, arguments in begun}
        self.original = self._last_hidden(None)

    @classmethod
    def on(
        cls, part: str, stream: StreamedModel, data: DistillationData, workers: Workers | None = None
    ) -> FidelityMeter:
        """A meter on one part of a lock's data: `validation` or `evaluation`."""
        rows, splits = getattr(data, part), data.record()["splits"]
        text = MeasuredText.of(rows, public_name(data.source), splits[part] if splits else None)
        return cls(stream, rows, text, workers)

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
        device, head = self.stream.device, self.stream.head
        figures = TextFigures(["original", "locked"], [("original", "locked")])
        for ids, own, student in zip(self.batches, self.original, self._last_hidden(chains), strict=True):
            states = {"original": own.to(device), "locked": student.to(device)}
            figures.add(ids.to(device), {name: Outputs(found, head) for name, found in states.items()})
        return_free_memory()
        self.workers.sum_(figures.sums)
        return figures.fidelity(self.text)
