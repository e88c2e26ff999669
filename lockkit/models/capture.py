"""Capture the inputs of all MLPs layer by layer, in one forward pass over the data.

The hidden states of all rows are kept from one decoder layer to the next. Each layer is read from the checkpoint once,
run over all rows, and freed. The method is that of llm-compressor's sequential pipeline. Each worker runs its share of
the rows and writes its part of a shared tensor of MLP inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lockkit.models.activation_cache import ActivationCache
from lockkit.models.layered import LayeredModel
from lockkit.models.sizes import TOKENS_IN_A_BATCH
from lockkit.workers import Workers

if TYPE_CHECKING:
    from lockkit.models.families import DecoderLayer


class LayerwiseCapture:
    """Runs a model's decoder layers, one after the other, over a fixed set of rows.

    Args:
        stream: the model.
        rows: token ids, `[rows, block]`.
        cache: for this worker's hidden states, `[its rows, block, hidden]`.
        name: first part of their name in the cache.
        workers: share the rows between them.
    """

    def __init__(self, stream: LayeredModel, rows: torch.Tensor, cache: ActivationCache, name: str, workers: Workers):
        self.stream = stream
        block = rows.shape[1]
        starts = range(0, len(rows), max(1, TOKENS_IN_A_BATCH // block))
        self.batches = [slice(start, min(start + starts.step, len(rows))) for start in starts]
        self.batches = self.batches[workers.rank :: workers.count]
        own_rows = sum(batch.stop - batch.start for batch in self.batches)
        self.arguments: dict[int, list[dict[str, Any]]] = {}  # of each layer, by number of rows in a batch
        self.hidden = cache.allocate(f"{name}-hidden-{workers.rank}", (own_rows, block, stream.config.hidden_size))
        for batch, hidden in self._parts():
            start, arguments = stream.begin(rows[batch])
            hidden.copy_(start)
            self.arguments.setdefault(len(hidden), arguments)

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """This worker's batches: their position among all rows, and their hidden states."""
        sizes = [batch.stop - batch.start for batch in self.batches]
        return zip(self.batches, self.hidden.split(sizes) if sizes else [], strict=True)

    @torch.no_grad()
    def advance(self, index: int, layer: DecoderLayer, mlp_inputs: torch.Tensor | None) -> None:
        """Run decoder layer `index` over this worker's rows. Call it for all layers in order.

        Args:
            index: the layer's position in the model.
            layer: the layer, with its weights.
            mlp_inputs: `[rows, block, hidden]`; this worker's rows are overwritten by the inputs of the layer's MLP.
                None if they are not needed.
        """
        for batch, hidden in self._parts():
            arguments = self.arguments[len(hidden)][index]
            with _input_of(layer.mlp) as captured:
                hidden.copy_(layer(hidden.to(self.stream.device), **arguments))
            if mlp_inputs is not None:
                mlp_inputs[batch] = captured[0].cpu()


@contextmanager
def _input_of(mlp: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that receives the inputs of `mlp` inside the `with` block."""
    captured: list[torch.Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _module, args: captured.append(args[0]))
    try:
        yield captured
    finally:
        hook.remove()
