"""Ways to keep less for the backward pass, by name; each is in force inside `with saver(name, model)`.

A saver must not change gradients (compression aside, which rounds). To add one, write a context
manager that takes the model, and enter it in `SAVERS`. Every gradient attack can use every saver,
on the original as on the lock.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lockkit.dlr.net import DLRNet
from lockkit.dlr.reversal import reversal
from lockkit.models.families import decoder_layers


def base_of(model: nn.Module) -> nn.Module:
    """The causal language model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def mlps_of(model: nn.Module) -> list[nn.Module]:
    """The MLPs, or the chains in their place."""
    return [layer.mlp for layer in decoder_layers(base_of(model))]


@contextlib.contextmanager
def _with_forward(modules: list[nn.Module], wrap: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Give modules another `forward` for a while."""
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

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@contextlib.contextmanager
def checkpoint_layers(model: nn.Module) -> Iterator[None]:
    """Keep each decoder layer's input only, and run the layer again in the backward pass."""
    with _with_forward(list(decoder_layers(base_of(model))), _checkpointed):
        yield


def checkpoint_blocks(blocks: int | None) -> Callable[[nn.Module], contextlib.AbstractContextManager]:
    """Keep the stream every `blocks` blocks of a chain (None: the square root of the depth).

    An ordinary MLP is taken as one block.
    """

    @contextlib.contextmanager
    def saver(model: nn.Module) -> Iterator[None]:
        def wrap(module: nn.Module) -> Callable:
            if not isinstance(module, DLRNet):
                return _checkpointed(module)
            return lambda x, gain=None: _chain_in_segments(module, x, gain, blocks)

        with _with_forward(mlps_of(model), wrap):
            yield

    return saver


def _chain_in_segments(chain: DLRNet, x: torch.Tensor, gain: float | None, blocks: int | None) -> torch.Tensor:
    size = blocks or max(1, round(math.sqrt(len(chain.blocks))))
    if not torch.is_grad_enabled():
        return DLRNet.forward(chain, x, gain)
    stream = None
    for first in range(0, len(chain.blocks), size):
        stream = checkpoint(chain.run_blocks, x, stream, first, first + size, gain, use_reentrant=False)
    return stream if chain.output_bias is None else stream + chain.output_bias


@contextlib.contextmanager
def checkpoint_nested(model: nn.Module) -> Iterator[None]:
    """Checkpoint decoder layers, and segments of the chains inside them."""
    with checkpoint_blocks(None)(model), checkpoint_layers(model):
        yield


@contextlib.contextmanager
def offload(model: nn.Module) -> Iterator[None]:
    """Keep what is saved in the CPU's memory. Gains nothing where the CPU trains."""
    with torch.autograd.graph.save_on_cpu(pin_memory=next(model.parameters()).device.type == "cuda"):
        yield


@contextlib.contextmanager
def compress(model: nn.Module) -> Iterator[None]:
    """Keep saved activations in bfloat16; weights are kept as they are."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor):
        if tensor.dtype != torch.float32 or tensor.untyped_storage().data_ptr() in weights:
            return tensor, None
        return tensor.to(torch.bfloat16), tensor.dtype

    def unpack(packed):
        tensor, dtype = packed
        return tensor if dtype is None else tensor.to(dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextlib.contextmanager
def nothing(_model: nn.Module) -> Iterator[None]:
    """Plain autograd."""
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
    """The saver called `name`, for `model`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SAVERS:
        raise ValueError(f"no memory saver '{name}': one of {', '.join(SAVERS)}")
    return SAVERS[name](model)
