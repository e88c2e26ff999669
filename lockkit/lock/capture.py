"""Teacher activations, one decoder layer at a time.

1. Run the model up to its first decoder layer on every batch of rows; keep the hidden states.
2. On the way, note the other arguments each layer gets (masks, position embeddings). Batches
   have equal shapes and no padding, so these are the same for all of them.
3. `next_layer` runs one decoder layer on all batches, hands out its MLP's inputs, and keeps
   its outputs as the hidden states of the layer after it.

Only one layer's MLP inputs and one set of hidden states exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from lockkit.models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _FirstLayerReached(Exception):
    """Ends a forward pass early: nothing past the first decoder layer's input is needed."""


class LayerwiseCapture:
    """Walks through a model's decoder layers over a fixed set of rows.

    Args:
        model: the teacher.
        rows: token ids `[rows, block]`; as many are used as fill whole batches.
        batch_rows: rows in a forward pass.
    """

    def __init__(self, model: PreTrainedModel, rows: torch.Tensor, batch_rows: int):
        self.layers = decoder_layers(model)
        batch_rows = min(batch_rows, len(rows))
        self.batches = list(rows[: len(rows) // batch_rows * batch_rows].split(batch_rows))
        self.device = model.device
        self.arguments = self._layer_arguments(model)
        self.hidden = [self._first_hidden(model, batch) for batch in self.batches]
        self.position = 0

    @torch.no_grad()
    def _layer_arguments(self, model: PreTrainedModel) -> list[dict]:
        """Keyword arguments of every decoder layer, from one full forward pass."""
        found: list[dict] = []

        def note(_module, _args, kwargs):
            found.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            model.model(self.batches[0].to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def _first_hidden(self, model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def catch(_module, args, kwargs):
            caught.append((args[0] if args else kwargs["hidden_states"]).cpu())
            raise _FirstLayerReached

        hook = self.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            model.model(batch.to(self.device), use_cache=False)
        except _FirstLayerReached:
            pass
        finally:
            hook.remove()
        return caught[0]

    @torch.no_grad()
    def next_layer(self) -> torch.Tensor:
        """Advance by one decoder layer; return its MLP's inputs, `[tokens, hidden]`, on the CPU."""
        layer, arguments = self.layers[self.position], self.arguments[self.position]
        inputs: list[torch.Tensor] = []
        with _inputs_of(layer.mlp, inputs):
            for index, hidden in enumerate(self.hidden):
                out = layer(hidden.to(self.device), **arguments)
                self.hidden[index] = (out[0] if isinstance(out, tuple) else out).cpu()
        self.position += 1
        return torch.cat(inputs)


@contextmanager
def _inputs_of(mlp: nn.Module, into: list[torch.Tensor]) -> Iterator[None]:
    hook = mlp.register_forward_pre_hook(lambda _module, args: into.append(args[0].flatten(0, -2).cpu()))
    try:
        yield
    finally:
        hook.remove()
