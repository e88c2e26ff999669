"""The chain's exact backward pass without its activations: the stream is rebuilt backwards.

Plain autograd keeps the input `t_l`, `[..., hidden]`, of every block. But a block's update is known
from its `rank` units, so going backwards each `t_l` follows from the one after it (the idea of
reversible networks, Gomez et al. 2017, arXiv 1707.04585, applied to low-rank updates):

1. Forward: keep the input of the last block and every block's pre-activations; with
   `anchor_every=k`, also the input of every k-th block.
2. Backward, from the last block to the first: the units follow from the pre-activations, and
   `t_l = t_{l+1} - gain * U_l a_l` (an anchor is taken as it is, which stops errors from adding up).
3. The block's gradients follow from `t_l`, the units and the gradient of the stream after it.

Kept per token: `hidden + 2 * width` values for a gated chain, `hidden + width` for two layers, against
`depth * hidden + 4 * width` or `+ 2 * width` in plain autograd; `hidden` more for every anchor; no
`hidden` at all if no gate or up matrix is trained. Paid for with one more product per block.

Blocks whose linear layers are not plain `nn.Linear` (adapters, quantised weights) are run once more
instead of differentiated by hand: step 1 keeps their units, step 3 is autograd over one block.

The stream is rebuilt in fp32 at least, whatever the chain computes in. Measured on chains of 32 blocks in
bf16: gradients within 0.3 - 0.6 % of plain autograd's (0.2 - 0.35 % with anchors every 6 blocks), which are
themselves 0.9 - 1.6 % from exact.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import autocast

from lockkit.dlr.net import DLRBlock, DLRNet
from lockkit.dlr.view import block_weights


def reversible_chain(
    chain: DLRNet, x: torch.Tensor, anchor_every: int | None = None, gain: float | None = None
) -> torch.Tensor:
    """`chain(x, gain)`, differentiable once, with activations rebuilt in the backward pass.

    Args:
        chain: its layers may hold adapters or quantised weights, but no active dropout.
        x: `[..., hidden]`.
        anchor_every: blocks between two kept streams; None keeps the last one only.
        gain: in place of the chain's own, see `DLRNet.forward`.

    Returns:
        `[..., hidden]`. Under autocast, types are those of the plain chain.

    Raises:
        ValueError: `anchor_every` is below 1, or a block would drop units at random.
    """
    if anchor_every is not None and anchor_every < 1:
        raise ValueError(f"anchor_every must be at least 1, not {anchor_every}")
    if not torch.is_grad_enabled():
        return DLRNet.forward(chain, x, gain)
    run = _Run(chain, x, chain.gain if gain is None else gain, anchor_every)
    stream = None
    for index, block in enumerate(chain.blocks):
        if run.plain:
            stream = _PlainBlock.apply(run, index, x, stream, *_matrices(block))
        else:
            stream = _AnyBlock.apply(run, index, x, stream, *_trained(block))
    return stream if chain.output_bias is None else stream + chain.output_bias


@contextlib.contextmanager
def reversal(model: nn.Module, anchor_every: int | None = None) -> Iterator[None]:
    """Put `reversible_chain` in place of the forward pass of every chain in `model`, for a while.

    Forward and backward pass must both be inside: `with reversal(model): model(...).loss.backward()`.
    A model without chains is left as it is. Outputs are unchanged; gradients are those of plain
    autograd up to rounding.

    Raises:
        ValueError: `anchor_every` is below 1.
    """
    if anchor_every is not None and anchor_every < 1:
        raise ValueError(f"anchor_every must be at least 1, not {anchor_every}")
    chains = [module for module in model.modules() if isinstance(module, DLRNet)]
    before = [chain.__dict__.get("forward") for chain in chains]

    def replacement(chain: DLRNet):
        return lambda x, gain=None: reversible_chain(chain, x, anchor_every, gain)

    for chain in chains:
        chain.forward = replacement(chain)
    try:
        yield
    finally:
        for chain, forward in zip(chains, before, strict=True):
            del chain.forward
            if forward is not None:
                chain.forward = forward


def _matrices(block: DLRBlock) -> list[torch.Tensor | None]:
    """Gate weight and bias, up weight and bias, down weight; None for what there is not."""
    own = block_weights(block)
    return [own.gate, own.gate_bias, own.up, own.up_bias, own.down]


def _trained(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


class _Run:
    """One pass through a chain. Its blocks are nodes of the graph, which runs backwards in their order.

    One node a block, not one a chain: so gradients of a block's matrices are handed on before those of
    the next come into being.
    """

    def __init__(self, chain: DLRNet, x: torch.Tensor, gain: float, anchor_every: int | None):
        self.chain, self.gain, self.anchor_every = chain, gain, anchor_every
        # Without the hooks of a module: those of PyTorch's FLOP counter refuse to run in a backward pass.
        self.activation = getattr(chain.activation, "forward", chain.activation)
        linears = [layer for block in chain.blocks for layer in block.children()]
        self.plain = all(type(layer) is nn.Linear for layer in linears)
        if not self.plain and any(
            isinstance(part, nn.Dropout) and part.p and part.training for part in chain.modules()
        ):
            raise ValueError("dropout inside a chain cannot be rebuilt: set it to 0, or call .eval()")
        # A block's input is needed for the gradients of its gate and up matrices, and only there.
        readers = [getattr(block, name) for block in chain.blocks for name in ("gate_proj", "up_proj")]
        self.rebuilds = not self.plain or any(layer.weight.requires_grad for layer in readers if layer is not None)
        device = x.device.type
        self.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            # A cast cached here, where there is no gradient, would serve a later pass that needs one.
            "cache_enabled": False,
        }
        self.input: torch.Tensor | None = None  # of the block whose turn it is in the backward pass
        self.dtype: torch.dtype | None = None  # of the blocks' inputs but, perhaps, the first's

    def keeps(self, index: int) -> bool:
        """Whether the input of block `index` is kept: the last one's, and every `anchor_every`-th."""
        anchor = self.anchor_every is not None and index % self.anchor_every == 0
        return self.rebuilds and (anchor or index == len(self.chain.blocks) - 1)

    def step_back(self, index: int, kept: torch.Tensor | None, update: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`t_index`: as kept, or from the one after it and this block's update."""
        if kept is not None:
            self.dtype = kept.dtype
            self.input = kept.to(torch.promote_types(kept.dtype, torch.float32))
        else:
            self.input = torch.sub(self.input, update(), alpha=self.gain)
        found = self.input.to(self.dtype)
        if index == 0:
            self.input = None
        return found


def _once(backward: Callable) -> Callable:
    """Refuse second derivatives: PyTorch's `once_differentiable` lets some pass as zero."""

    @functools.wraps(backward)
    def guarded(ctx, gradient):
        if torch.is_grad_enabled():  # it is exactly when the caller asks for `create_graph`
            raise RuntimeError("a reversible chain can be differentiated once: leave reversal out, or create_graph")
        return backward(ctx, gradient)

    return guarded


def _gradients_of_streams(run: _Run, gradient: torch.Tensor, t_gradient: torch.Tensor, first: bool):
    """Of `x` and `s_l`, given those of `s_{l+1}` and `t_l = x + gain * s_l`."""
    return t_gradient, None if first else torch.add(gradient, t_gradient.to(gradient.dtype), alpha=run.gain)


class _PlainBlock(torch.autograd.Function):
    """A block of plain linear layers, differentiated by hand; returns the stream after it."""

    @staticmethod
    def forward(ctx, run, index, x, stream, gate, gate_bias, up, up_bias, down):
        with autocast(**run.autocast):
            t = run.chain.block_input(x, stream, run.gain)
            gated = [] if gate is None else [F.linear(t, gate, gate_bias)]
            before = [*gated, F.linear(t, up, up_bias)]  # pre-activations, [..., rank] each
            update = F.linear(DLRBlock.units(before, run.activation), down)
        ctx.run, ctx.index = run, index
        ctx.save_for_backward(gate, gate_bias, up, up_bias, down, t if run.keeps(index) else None, *before)
        return update if stream is None else stream + update

    @staticmethod
    @_once
    def backward(ctx, gradient):
        run, index = ctx.run, ctx.index
        *matrices, kept = ctx.saved_tensors[:6]
        gate, _, up, _, down = matrices
        with autocast(**run.autocast):
            after, unit_gradients = _through_activation(run.activation, ctx.saved_tensors[6:], gradient, down)
            t = run.step_back(index, kept, lambda: F.linear(after, down)) if run.rebuilds else None
            found = _matrix_gradients(matrices, ctx.needs_input_grad[4:], t, after, unit_gradients, gradient)
            t_gradient = unit_gradients[-1] @ up
            if gate is not None:
                t_gradient = t_gradient + unit_gradients[0] @ gate
        return None, None, *_gradients_of_streams(run, gradient, t_gradient, index == 0), *found


class _AnyBlock(torch.autograd.Function):
    """A block of any linear layers, rebuilt from its units and run again; returns the stream after it."""

    @staticmethod
    def forward(ctx, run, index, x, stream, *trained):
        block = run.chain.blocks[index]
        with autocast(**run.autocast):
            t = run.chain.block_input(x, stream, run.gain)
            units = block.units(block.pre_activations(t), run.activation)
            update = block.down_proj(units)
        ctx.run, ctx.index = run, index
        ctx.save_for_backward(*((t, None) if run.keeps(index) else (None, units)))
        return update if stream is None else stream + update

    @staticmethod
    @_once
    def backward(ctx, gradient):
        run, index = ctx.run, ctx.index
        block = run.chain.blocks[index]
        kept, units = ctx.saved_tensors
        with autocast(**run.autocast):
            t = run.step_back(index, kept, lambda: block.down_proj(units)).detach().requires_grad_()
            with torch.enable_grad():
                # A view, since the hooks of PyTorch's FLOP counter refuse a module's input to be a leaf here.
                update = block(t.view_as(t), run.activation)
                t_gradient, *found = torch.autograd.grad(
                    update, [t, *_trained(block)], gradient.to(update.dtype), allow_unused=True
                )
        return None, None, *_gradients_of_streams(run, gradient, t_gradient, index == 0), *found


def _through_activation(activation, before, stream_gradient, down) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The units, and the gradients of the pre-activations they came from."""
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in before]
        after = DLRBlock.units(leaves, activation)
    return after.detach(), torch.autograd.grad(after, leaves, (stream_gradient @ down).to(after.dtype))


def _matrix_gradients(parameters, needs, t, after, unit_gradients, stream_gradient) -> list[torch.Tensor | None]:
    """Gradients of a block's five tensors, in the order of `_matrices`; None where none is needed."""
    gate, up = unit_gradients[0], unit_gradients[-1]
    pairs = ((gate, t), (gate, None), (up, t), (up, None), (stream_gradient, after))
    found = []
    for parameter, needed, (out, into) in zip(parameters, needs, pairs, strict=True):
        if not needed:
            found.append(None)
        elif into is None:
            found.append(_bias_gradient(out, parameter.dtype))
        else:
            found.append((out.flatten(0, -2).mT @ into.flatten(0, -2)).to(parameter.dtype))
    return found


def _bias_gradient(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return gradient.flatten(0, -2).sum(0).to(dtype)
