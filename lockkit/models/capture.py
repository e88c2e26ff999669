"""Inputs of the MLPs, layer after layer, without running the model from its start for each.

The hidden states of all rows are kept, from one decoder layer to the next; a layer is read from
the checkpoint once, run over all rows, and freed (the idea of llm-compressor's sequential
pipeline). Each worker runs its share of the rows; the MLPs' inputs go to a tensor they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lockkit.models.activation_cache import ActivationCache
from lockkit.models.layered import LayeredModel
from lockkit.workers import Workers

TOKENS_IN_A_BATCH = 2048


class LayerwiseCapture:
    """Walks through a model's decoder layers over a fixed set of rows.

    Args:
        stream: the model.
        rows: token ids `[rows, block]`.
        cache: holds the hidden states, under names that begin with `name`.
    """

    def __init__(self, stream: LayeredModel, rows: torch.Tensor, cache: ActivationCache, name: str, workers: Workers):
        self.stream = stream
        block = rows.shape[1]
        starts = range(0, len(rows), max(1, TOKENS_IN_A_BATCH // block))
        self.batches = [slice(start, min(start + starts.step, len(rows))) for start in starts]
        self.batches = self.batches[workers.rank :: workers.count]
        own_rows = sum(batch.stop - batch.start for batch in self.batches)
        self.arguments: dict[int, list[dict]] = {}  # by rows in a batch
        self.hidden = cache.allocate(f"{name}-hidden-{workers.rank}", (own_rows, block, stream.config.hidden_size))
        for batch, hidden in self._parts():
            start, arguments = stream.begin(rows[batch])
            hidden.copy_(start)
            self.arguments.setdefault(len(hidden), arguments)

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each batch of this worker: its place among all rows, and its hidden states."""
        sizes = [batch.stop - batch.start for batch in self.batches]
        return zip(self.batches, self.hidden.split(sizes) if sizes else [], strict=True)

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module, mlp_inputs: torch.Tensor | None) -> None:
        """Run decoder layer `index` over this worker's rows.

        Args:
            mlp_inputs: `[rows, block, hidden]`, gets the inputs of the layer's MLP; None: they are not wanted.
        """
        for batch, hidden in self._parts():
            arguments = self.arguments[len(hidden)][index]
            with _input_of(layer.mlp) as caught:
                hidden.copy_(layer(hidden.to(self.stream.device), **arguments))
            if mlp_inputs is not None:
                mlp_inputs[batch] = caught[0].cpu()


@contextmanager
def _input_of(mlp: nn.Module) -> Iterator[list[torch.Tensor]]:
    caught: list[torch.Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        yield caught
    finally:
        hook.remove()
