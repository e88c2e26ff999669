"""A pretrained model that is never in memory as a whole: decoder layers are read one at a time.

1. A skeleton of the model has its weights on the `meta` device, where they take no memory; its
   buffers (rotary frequencies, scales) are real.
2. What is not in a decoder layer (embeddings, last norm, head) is read once and stays.
3. `layer(i)` reads one decoder layer from the checkpoint, in the dtype asked for; when its block
   ends, the memory is free again.
4. What happens before the first layer and after the last one is the model's own forward pass,
   with the layers replaced by functions that do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from lockkit.errors import UsageError
from lockkit.models.families import Family, decoder_layers, is_locked
from lockkit.models.load import check_safetensors
from lockkit.models.locked import locked_classes


class Checkpoint:
    """The tensors in a folder of safetensors, read by the names a model gives them.

    Raises:
        UsageError: no safetensors, or broken ones.
    """

    def __init__(self, folder: Path):
        check_safetensors(folder)
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: folder / file for name, file in weight_map.items()}
        else:
            self.files = {}
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, "pt") as tensors:
                    self.files.update(dict.fromkeys(tensors.keys(), file))

    def stored_name(self, name: str) -> str | None:
        """The name a tensor is stored under: with or without the base model's prefix."""
        candidates = (name, name.removeprefix("model."), f"model.{name}")
        return next((candidate for candidate in candidates if candidate in self.files), None)

    def read(self, names: list[str], device: str | torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Those of `names` that the checkpoint has; integers keep their dtype."""
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            if stored := self.stored_name(name):
                by_file.setdefault(self.files[stored], []).append((name, stored))
        found = {}
        for file, wanted in by_file.items():
            with safe_open(file, "pt") as tensors:
                for name, stored in wanted:
                    value = tensors.get_tensor(stored)
                    found[name] = value.to(device, dtype if value.is_floating_point() else None, copy=True)
        return found


class LayeredModel:
    """A causal language model taken apart: what comes before its decoder layers, the layers, what comes after.

    Args:
        model: an original or a locked model, in memory as a whole or with its layers on `meta`.
        device: where it is computed.
    """

    def __init__(self, model: nn.Module, device: str | torch.device):
        self.model, self.device, self.config = model, torch.device(device), model.config
        self.layers = decoder_layers(model)

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def begin(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
        """The first layer's input for token ids `[rows, block]`, and every layer's other arguments.

        Returns:
            Hidden states, `[rows, block, hidden]`, and keyword arguments by layer (masks, positions).
        """
        arguments: list[dict] = [{} for _ in self.layers]
        first: list[torch.Tensor] = []

        def note(index, hidden, **others):
            arguments[index] = others
            first.append(hidden)
            return hidden

        with self._layers_doing(note):
            self.model.model(ids.to(self.device), use_cache=False)
        return first[0], arguments

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last layer's output, `[rows, block, hidden]`, for token ids `[rows, block]`; all layers in memory."""
        hidden, arguments = self.begin(ids)
        for layer, own in zip(self.layers, arguments, strict=True):
            hidden = layer(hidden, **own)
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, `[..., vocab]`, of the last layer's output, `[..., hidden]`; differentiable in `hidden`.

        It is the model's own forward pass, so that a last norm, a soft cap or a scale of the logits is
        in it. What follows the layers treats every position alone, so each one is a row of length 1:
        any part of a text may be given, and no mask or position is made for more than one token.
        """
        rows = hidden.flatten(0, -2)[:, None]
        last = len(self) - 1

        def stand_in(index, own, **_):
            return rows if index == last else own

        with self._layers_doing(stand_in):
            return self.model(inputs_embeds=rows, use_cache=False).logits.view(*hidden.shape[:-1], -1)

    @contextmanager
    def _layers_doing(self, function: Callable) -> Iterator[None]:
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(function, index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


class StreamedModel(LayeredModel):
    """A causal language model for inference, one decoder layer at a time.

    Args:
        folder: a checkpoint of `family`, original or locked, with `config`.
        device: where layers are computed.
        dtype: of weights and activations.

    Raises:
        UsageError: the checkpoint is broken or lacks tensors.
    """

    def __init__(
        self, folder: Path, config: PreTrainedConfig, family: Family, device: str, dtype: torch.dtype = torch.float32
    ):
        super().__init__(empty_model(config, family).to(dtype).eval().requires_grad_(False), device)
        self.folder, self.family, self.dtype = folder, family, dtype
        self.checkpoint = Checkpoint(folder)
        self.keep_layers = False  # whether `layer` leaves weights in memory for the next time
        self._read_everything_else()

    def _read_everything_else(self) -> None:
        outside = [name for name in self.model.state_dict() if ".layers." not in name]
        found = self.checkpoint.read(outside, self.device, self.dtype)
        self._assign(self.model, found)
        self.model.tie_weights()
        self._require_complete({n: p for n, p in self.model.named_parameters() if ".layers." not in n})
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer is not None and not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))
        for index in range(len(self)):
            prefix = self._prefix(index)
            missing = [n for n in self.layers[index].state_dict() if not self.checkpoint.stored_name(prefix + n)]
            self._require_complete({prefix + name: None for name in missing})

    def _require_complete(self, parameters: dict[str, torch.Tensor | None]) -> None:
        missing = [name for name, value in parameters.items() if value is None or value.is_meta]
        if missing:
            raise UsageError(
                f"the weights in {self.folder} lack {len(missing)} tensors, {missing[0]} among them: change MODEL"
            )

    def _assign(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        expected = module.state_dict()
        for name, value in tensors.items():
            if value.shape != expected[name].shape:
                raise UsageError(
                    f"the weights in {self.folder} cannot be loaded (their shapes are not those of its config.json): "
                    "change MODEL"
                )
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)

    def _prefix(self, index: int) -> str:
        return f"model.layers.{index}."

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights, for as long as the block lasts."""
        layer = self.read_layer(index)
        try:
            yield layer
        finally:
            if not self.keep_layers:
                self.drop_layer(index)

    def read_layer(self, index: int) -> nn.Module:
        """One decoder layer with its weights, until `drop_layer`; read only if they are not there."""
        layer = self.layers[index]
        prefix = self._prefix(index)
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
        """Free all decoder layers' weights, and keep none from now on."""
        self.keep_layers = False
        for index in range(len(self)):
            self.drop_layer(index)


def return_free_memory() -> None:
    """Give freed memory back to the system; glibc's allocator keeps it otherwise, layer after layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def import_model_class(family: Family) -> type[nn.Module]:
    """The family's class; transformers imports some 80 MB of libraries for the first of them."""
    import accelerate  # noqa: F401
    import transformers

    return getattr(transformers, family.model_class)


def empty_model(config: PreTrainedConfig, family: Family) -> nn.Module:
    """The model of `config` without memory for its weights; its buffers are real."""
    from accelerate import init_empty_weights

    model_class = locked_classes(family)[1] if is_locked(config) else import_model_class(family)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    model.tie_weights()
    return model
