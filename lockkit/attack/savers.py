"""Memory savers: ways to keep fewer activations for the backward pass, by name.

A saver is active inside `with saver(name, model)`. It does not change gradients, except for compression, which rounds.
To add one, write a context manager that takes the model, and add it to `SAVERS`. Every gradient attack can use every
saver, on the original and on the lock.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lockkit.dlr.net import DLRNet
from lockkit.dlr.reversal import reversal
from lockkit.models.families import decoder_layers


def base_of(model: nn.Module) -> nn.Module:
    """The causal language model that adapters wrap, or `model` itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def mlps_of(model: nn.Module) -> list[nn.Module]:
    """The MLPs of all decoder layers, or the chains in their place."""
    return [layer.mlp for layer in decoder_layers(base_of(model))]


@contextlib.contextmanager
def _with_forward(modules: list[nn.Module], wrap: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Replace the `forward` of modules inside the block."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = wrap(module)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _checkpointed(module: nn.Module) -> Callable:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@contextlib.contextmanager
def checkpoint_layers(model: nn.Module) -> Iterator[None]:
    """Keep only the input of each decoder layer, and run the layer again in the backward pass."""
    with _with_forward(list(decoder_layers(base_of(model))), _checkpointed):
        yield


def checkpoint_blocks(blocks: int | None) -> Callable[[nn.Module], contextlib.AbstractContextManager]:
    """A saver that keeps the stream after every `blocks` blocks of a chain, and runs these blocks again.

    Args:
        blocks: blocks in a segment; None for the square root of the depth. An ordinary MLP is one block.
    """

    @contextlib.contextmanager
    def saver(model: nn.Module) -> Iterator[None]:
        def wrap(module: nn.Module) -> Callable:
            if not isinstance(module, DLRNet):
                return _checkpointed(module)
            return lambda x: _chain_in_segments(module, x, blocks)

        with _with_forward(mlps_of(model), wrap):
            yield

    return saver


def _chain_in_segments(chain: DLRNet, x: torch.Tensor, blocks: int | None) -> torch.Tensor:
    size = blocks or max(1, round(math.sqrt(len(chain.blocks))))
    if not torch.is_grad_enabled():
        return DLRNet.forward(chain, x)
    stream: torch.Tensor | None = None
    for first in range(0, len(chain.blocks), size):
        stream = checkpoint(chain.run_blocks, x, stream, first, first + size, use_reentrant=False)
    assert stream is not None, "a chain has at least one block"
    return stream if chain.output_bias is None else stream + chain.output_bias


@contextlib.contextmanager
def checkpoint_nested(model: nn.Module) -> Iterator[None]:
    """Checkpoint decoder layers, and inside them segments of the chains."""
    with checkpoint_blocks(None)(model), checkpoint_layers(model):
        yield


@contextlib.contextmanager
def offload(model: nn.Module) -> Iterator[None]:
    """Keep saved activations in the CPU's memory. This saves nothing if the training itself runs on the CPU."""
    with torch.autograd.graph.save_on_cpu(pin_memory=next(model.parameters()).device.type == "cuda"):
        yield


@contextlib.contextmanager
def compress(model: nn.Module) -> Iterator[None]:
    """Keep saved activations in bfloat16. Saved weights are not rounded."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
        if tensor.dtype != torch.float32 or tensor.untyped_storage().data_ptr() in weights:
            return tensor, None
        return tensor.to(torch.bfloat16), tensor.dtype

    def unpack(packed: tuple[torch.Tensor, torch.dtype | None]) -> torch.Tensor:
        tensor, dtype = packed
        return tensor if dtype is None else tensor.to(dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextlib.contextmanager
def nothing(_model: nn.Module) -> Iterator[None]:
    """Plain autograd: no saver."""
    yield


SAVERS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager]] = {
    "none": nothing,
    "checkpoint-layers": checkpoint_layers,
    "checkpoint-blocks": checkpoint_blocks(1),
    "checkpoint-sqrt": checkpoint_blocks(None),
    "checkpoint-chains": checkpoint_blocks(10**9),
    "checkpoint-nested": checkpoint_nested,
    "offload": offload,
    "compress": compress,
    "reversal": reversal,
    "reversal-anchored": functools.partial(reversal, anchor_every=6),
    "reversal-anchored-12": functools.partial(reversal, anchor_every=12),
}


def saver(name: str, model: nn.Module) -> contextlib.AbstractContextManager:
    """The saver called `name`, applied to `model`.

    Raises:
        ValueError: there is no saver of that name.
    """
    if name not in SAVERS:
        raise ValueError(f"no memory saver '{name}': one of {', '.join(SAVERS)}")
    return SAVERS[name](model)
