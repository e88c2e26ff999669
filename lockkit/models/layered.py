"""A pretrained model in memory one decoder layer at a time.

1. The model is created with its weights on the `meta` device, where they take no memory. Its buffers (rotary
   frequencies, scales) are real.
2. Weights outside the decoder layers (embeddings, last norm, head) are read once and stay in memory. Two models whose
   weights there are the same, such as an original and its lock, share them.
3. `layer(i)` reads one decoder layer from the checkpoint and frees its memory at the end of the `with` block.
4. The computation before the first and after the last layer is the model's own forward pass, with the layers replaced
   by functions that do not compute anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lockkit.models.checkpoint import Checkpoint, note_untied_head
from lockkit.models.config_checks import unusable
from lockkit.models.families import Family, decoder_layers, is_locked
from lockkit.models.locked import locked_classes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.models.families import DecoderLayer


class LayeredModel:
    """A causal language model in three parts: before its decoder layers, the layers, and after them.

    Args:
        model: an original or a locked model, in memory as a whole or with its layers on `meta`.
        device: for the computation.
    """

    def __init__(self, model: PreTrainedModel, device: str | torch.device):
        self.model, self.device = model, torch.device(device)
        self.config: PreTrainedConfig = model.config
        self.layers = decoder_layers(model)

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def begin(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Compute what comes before the decoder layers, for token ids `[rows, block]`.

        Returns:
            The first layer's input, `[rows, block, hidden]`, and the keyword arguments of every layer (masks,
            positions).
        """
        arguments: list[dict[str, Any]] = [{} for _ in self.layers]
        first: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, **others: Any) -> torch.Tensor:
            arguments[index] = others
            first.append(hidden)
            return hidden

        with self._layers_replaced(record):
            self.model.model(ids.to(self.device), use_cache=False)
        return first[0], arguments

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last layer's output, `[rows, block, hidden]`, for token ids `[rows, block]`. All layers must be in memory."""
        hidden, arguments = self.begin(ids)
        for layer, own in zip(self.layers, arguments, strict=True):
            hidden = layer(hidden, **own)
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute what comes after the decoder layers. Differentiable with respect to `hidden`.

        It is the model's own forward pass, so a last norm, a soft cap or a scale of the logits is included. The
        computation after the layers treats each position independently. So each position is a row of length 1: any
        part of a text may be given, and masks and positions are made for one token only.

        Args:
            hidden: output of the last layer, `[..., hidden]`.

        Returns:
            Logits, `[..., vocab]`.
        """
        rows = hidden.flatten(0, -2)[:, None]
        last = len(self) - 1

        def result(index: int, own: torch.Tensor, **_: Any) -> torch.Tensor:
            return rows if index == last else own

        with self._layers_replaced(result):
            return self.model(inputs_embeds=rows, use_cache=False).logits.view(*hidden.shape[:-1], -1)

    @contextmanager
    def _layers_replaced(self, function: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Replace the forward pass of every layer by `function(index, hidden, **arguments)` inside the `with` block."""
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(function, index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


class StreamedModel(LayeredModel):
    """A causal language model for inference, in memory one decoder layer at a time.

    Args:
        folder: the model's checkpoint, original or locked.
        config: its configuration.
        family: its family.
        device: for the computation.
        dtype: of weights and activations.
        beside: a model in memory on the same device. Its weights outside the decoder layers that have the same dtype, and
            are bit by bit those in `folder`, are used here, too, instead of a copy.

    Attributes:
        config: its configuration. `tie_word_embeddings` is false if the weights have a head of their own.

    Raises:
        UsageError: the checkpoint is broken, incomplete or of another model.
    """

    def __init__(
        self,
        folder: Path,
        config: PreTrainedConfig,
        family: Family,
        device: str,
        dtype: torch.dtype = torch.float32,
        beside: StreamedModel | None = None,
    ):
        super().__init__(empty_model(config, family).to(dtype).eval().requires_grad_(False), device)
        self.folder, self.family, self.dtype = folder, family, dtype
        self.checkpoint = Checkpoint(folder, self.model)
        self.keep_layers = False  # whether `layer` leaves the weights in memory at the end of its `with` block
        self._read_outside(beside.outside() if beside else {})

    def outside(self) -> dict[str, torch.Tensor]:
        """The weights outside the decoder layers, by name. A tied matrix is there under both names."""
        return {name: value for name, value in self.model.state_dict().items() if ".layers." not in name}

    @contextmanager
    def without_outside(self) -> Iterator[None]:
        """Free the weights outside the decoder layers inside the `with` block, and read them again after it.

        They are not read again after an error.
        """
        self._assign(self.model, {name: value.to("meta") for name, value in self.outside().items()})
        return_free_memory()
        yield
        self._read_outside({})

    def _read_outside(self, known: dict[str, torch.Tensor]) -> None:
        """Read the weights outside the decoder layers, except those that are in `known` with the same values."""
        outside = list(self.outside())
        known = {name: value for name, value in known.items() if value.dtype == self.dtype}
        found = {name: value for name, value in known.items() if self.checkpoint.holds(name, value)}
        found |= self.checkpoint.read([name for name in outside if name not in found], self.device, self.dtype)
        self._assign(self.model, found)
        # With the missing ones, it ties as `from_pretrained` does: not if both matrices are there and differ.
        self.model.tie_weights(missing_keys=set(outside) - found.keys(), recompute_mapping=False)
        note_untied_head(self.model, self.folder)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer is not None and not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))

    def _assign(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """One decoder layer with its weights, inside the `with` block."""
        layer = self.read_layer(index)
        try:
            yield layer
        finally:
            if not self.keep_layers:
                self.drop_layer(index)

    def read_layer(self, index: int) -> DecoderLayer:
        """One decoder layer with its weights, until `drop_layer`. Weights in memory are not read again."""
        layer = self.layers[index]
        prefix = f"model.layers.{index}."
        names = [prefix + name for name, value in layer.state_dict().items() if value.is_meta]
        if names:
            found = self.checkpoint.read(names, self.device, self.dtype)
            self._assign(layer, {name.removeprefix(prefix): value for name, value in found.items()})
        return layer

    def drop_layer(self, index: int) -> None:
        """Free the weights of a decoder layer."""
        self.layers[index].to("meta")
        return_free_memory()

    def drop_layers(self) -> None:
        """Free the weights of all decoder layers, and keep none in memory from now on."""
        self.keep_layers = False
        for index in range(len(self)):
            self.drop_layer(index)


def return_free_memory() -> None:
    """Return freed memory to the system. Otherwise glibc's allocator keeps it, for layer after layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def import_model_class(family: Family) -> type[PreTrainedModel]:
    """The family's model class. The first import of such a class loads libraries that take some 80 MB of memory."""
    import accelerate  # noqa: F401
    import transformers

    return getattr(transformers, family.model_class)


def empty_model(config: PreTrainedConfig, family: Family) -> PreTrainedModel:
    """A model with its weights on the `meta` device. Its buffers are real.

    Raises:
        UsageError: no model can be built from its configuration.
    """
    from accelerate import init_empty_weights

    model_class = locked_classes(family)[1] if is_locked(config) else import_model_class(family)
    try:
        with init_empty_weights(include_buffers=False):
            model = model_class(config)
        model.tie_weights()
    except Exception as error:
        raise unusable(config, error) from error
    return model
