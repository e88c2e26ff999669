"""The backward pass of a chain with little activation memory: block inputs are recomputed from the last one.

Plain autograd saves the input `t_l`, `[..., hidden]`, of every block. Here the backward pass subtracts each block's
update, which follows from its `rank` units, and so obtains each `t_l` from `t_{l+1}`. This is the idea of reversible
networks (Gomez et al. 2017, arXiv 1707.04585), applied to low-rank updates:

1. Forward: save the input of the last block and the pre-activations of every block. With `anchor_every=k`, also save
   the input of every k-th block (an anchor).
2. Backward, from the last block to the first: compute the units from the pre-activations, then
   `t_l = t_{l+1} - gain * U_l a_l`. An anchor is used as saved, so that rounding errors do not accumulate.
3. Compute the block's gradients from `t_l`, the units, and the gradient of the stream after the block.

Saved values per token: `hidden + 2 * width` for a gated chain, `hidden + width` for two layers. Plain autograd saves
`depth * hidden + 4 * width` and `depth * hidden + 2 * width`. Every anchor adds `hidden`. If no gate or up matrix is
trained, no `hidden` is saved at all. The cost is one additional product per block.

A block whose linear layers are not plain `nn.Linear` (adapters, quantised weights) has no backward pass by hand.
Step 1 then saves its units instead, and step 3 runs the block again under autograd.

Block inputs are recomputed at least in fp32, whatever the chain's dtype. Measured on chains of 32 blocks in bf16:
gradients are within 0.3 - 0.6 % of those of plain autograd (0.2 - 0.35 % with an anchor every 6 blocks). Those
are themselves 0.9 - 1.6 % from the exact gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import autocast

from lockkit.dlr.net import DLRBlock, DLRNet
from lockkit.dlr.view import block_weights

Activation = Callable[[torch.Tensor], torch.Tensor]
Gradients = tuple[torch.Tensor | None, ...]


def reversible_chain(chain: DLRNet, x: torch.Tensor, anchor_every: int | None = None) -> torch.Tensor:
    """`chain(x)`, differentiable once; the backward pass recomputes the block inputs.

    Args:
        chain: its linear layers may have adapters or quantised weights, but no active dropout.
        x: the MLP's input, `[..., hidden]`.
        anchor_every: save the input of every `anchor_every`-th block; None saves only the last block's.

    Returns:
        The chain's output, `[..., hidden]`. Under autocast, dtypes are those of the plain chain.

    Raises:
        ValueError: `anchor_every` is below 1, or a block has active dropout.
    """
    _check_anchors(anchor_every)
    if not torch.is_grad_enabled():
        return DLRNet.forward(chain, x)
    run = _Run(chain, x, anchor_every)
    stream: torch.Tensor | None = None
    for index, block in enumerate(chain.blocks):
        if run.plain:
            stream = _PlainBlock.apply(run, index, x, stream, *_matrices(block))
        else:
            stream = _AnyBlock.apply(run, index, x, stream, *_trained(block))
    assert stream is not None, "a chain has at least one block"
    return stream if chain.output_bias is None else stream + chain.output_bias


@contextlib.contextmanager
def reversal(model: nn.Module, anchor_every: int | None = None) -> Iterator[None]:
    """Inside the `with` block, run every chain in `model` with `reversible_chain`.

    Forward and backward pass must both be inside the block: `with reversal(model): model(...).loss.backward()`.
    A model without chains is left as it is. Outputs are unchanged; gradients are those of plain
    autograd up to rounding.

    Raises:
        ValueError: `anchor_every` is below 1.
    """
    _check_anchors(anchor_every)
    chains = [module for module in model.modules() if isinstance(module, DLRNet)]
    # `forward` on the instance hides the class's own; another replacement may be there already.
    before = [vars(chain).get("forward") for chain in chains]

    def replacement(chain: DLRNet) -> Callable[..., torch.Tensor]:
        return lambda x: reversible_chain(chain, x, anchor_every)

    for chain in chains:
        vars(chain)["forward"] = replacement(chain)
    try:
        yield
    finally:
        for chain, forward in zip(chains, before, strict=True):
            if forward is None:
                del vars(chain)["forward"]
            else:
                vars(chain)["forward"] = forward


def _check_anchors(anchor_every: int | None) -> None:
    if anchor_every is not None and anchor_every < 1:
        raise ValueError(f"anchor_every must be at least 1, not {anchor_every}")


def _matrices(block: DLRBlock) -> list[torch.Tensor | None]:
    """Gate weight and bias, up weight and bias, down weight. None: the block does not have this tensor."""
    own = block_weights(block)
    return [own.gate, own.gate_bias, own.up, own.up_bias, own.down]


def _trained(block: DLRBlock) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


class _Run:
    """The state of one pass through a chain.

    Each block is one node of autograd's graph, so the backward pass visits the blocks in reverse order. With one node
    per chain, the gradients of all blocks' matrices would be in memory at the same time.
    """

    def __init__(self, chain: DLRNet, x: torch.Tensor, anchor_every: int | None):
        self.chain, self.anchor_every = chain, anchor_every
        # Call `forward` directly: the module hooks of PyTorch's FLOP counter fail in a backward pass.
        self.activation: Activation = getattr(chain.activation, "forward", chain.activation)
        linears = [layer for block in chain.blocks for layer in block.children()]
        self.plain = all(type(layer) is nn.Linear for layer in linears)
        if not self.plain and any(
            isinstance(part, nn.Dropout) and part.p and part.training for part in chain.modules()
        ):
            raise ValueError("dropout inside a chain cannot be recomputed: set it to 0, or call .eval()")
        # A block's input is needed only for the gradients of its gate and up matrices.
        readers = [layer for block in chain.blocks for layer in (block.gate_proj, block.up_proj) if layer is not None]
        self.recomputes_inputs = not self.plain or any(layer.weight.requires_grad for layer in readers)
        device = x.device.type
        self.autocast: dict[str, Any] = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            # A cast cached here has no gradient, and a later pass that needs one would use it.
            "cache_enabled": False,
        }
        self.input: torch.Tensor | None = None  # of the block that the backward pass has reached
        self.dtype: torch.dtype | None = None  # of block inputs; the first block's may differ

    def saves_input(self, index: int) -> bool:
        """Whether the input of block `index` is saved: the last block's, and every `anchor_every`-th."""
        anchor = self.anchor_every is not None and index % self.anchor_every == 0
        return self.recomputes_inputs and (anchor or index == len(self.chain.blocks) - 1)

    def step_back(self, index: int, saved: torch.Tensor | None, update: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The input of block `index`, `[..., hidden]`: `saved`, or the next block's input minus `gain * update()`."""
        if saved is not None:
            self.dtype = saved.dtype
            self.input = saved.to(torch.promote_types(saved.dtype, torch.float32))
        else:
            assert self.input is not None, "the last block's input is always saved"
            self.input = torch.sub(self.input, update(), alpha=self.chain.gain)
        found = self.input.to(self.dtype)
        if index == 0:
            self.input = None
        return found


def _once(backward: Callable[[Any, torch.Tensor], Gradients]) -> Callable[[Any, torch.Tensor], Gradients]:
    """Refuse second derivatives. PyTorch's `once_differentiable` returns some of them as zero."""

    @functools.wraps(backward)
    def guarded(ctx: Any, gradient: torch.Tensor) -> Gradients:
        if torch.is_grad_enabled():  # true in a backward pass only with `create_graph`
            raise RuntimeError("a reversible chain can be differentiated once: leave reversal out, or create_graph")
        return backward(ctx, gradient)

    return guarded


def _gradients_of_inputs(run: _Run, gradient: torch.Tensor, t_gradient: torch.Tensor, first: bool) -> Gradients:
    """Gradients of `x` and `s_l`, given those of `s_{l+1}` (`gradient`) and of `t_l = x + gain * s_l`."""
    return t_gradient, None if first else torch.add(gradient, t_gradient.to(gradient.dtype), alpha=run.chain.gain)


class _PlainBlock(torch.autograd.Function):
    """A block of plain linear layers, with a backward pass by hand. Returns the stream after the block."""

    @staticmethod
    def forward(
        ctx: Any,
        run: _Run,
        index: int,
        x: torch.Tensor,
        stream: torch.Tensor | None,
        gate: torch.Tensor | None,
        gate_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        down: torch.Tensor,
    ) -> torch.Tensor:
        with autocast(**run.autocast):
            t = run.chain.block_input(x, stream)
            gated = [] if gate is None else [F.linear(t, gate, gate_bias)]
            before = [*gated, F.linear(t, up, up_bias)]  # pre-activations, [..., rank] each
            update = F.linear(DLRBlock.units(before, run.activation), down)
        ctx.run, ctx.index = run, index
        ctx.save_for_backward(gate, gate_bias, up, up_bias, down, t if run.saves_input(index) else None, *before)
        return update if stream is None else stream + update

    @staticmethod
    @_once
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        run, index = ctx.run, ctx.index
        *matrices, saved = ctx.saved_tensors[:6]
        gate, _, up, _, down = matrices
        with autocast(**run.autocast):
            units, unit_gradients = _through_activation(run.activation, ctx.saved_tensors[6:], gradient, down)
            t = run.step_back(index, saved, lambda: F.linear(units, down)) if run.recomputes_inputs else None
            found = _matrix_gradients(matrices, ctx.needs_input_grad[4:], t, units, unit_gradients, gradient)
            t_gradient = unit_gradients[-1] @ up
            if gate is not None:
                t_gradient = t_gradient + unit_gradients[0] @ gate
        return None, None, *_gradients_of_inputs(run, gradient, t_gradient, index == 0), *found


class _AnyBlock(torch.autograd.Function):
    """A block of any linear layers; the backward pass runs it again. Returns the stream after the block."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, index: int, x: torch.Tensor, stream: torch.Tensor | None, *trained: torch.Tensor
    ) -> torch.Tensor:
        block = run.chain.blocks[index]
        with autocast(**run.autocast):
            t = run.chain.block_input(x, stream)
            units = block.units(block.pre_activations(t), run.activation)
            update = block.down_proj(units)
        ctx.run, ctx.index = run, index
        ctx.save_for_backward(*((t, None) if run.saves_input(index) else (None, units)))
        return update if stream is None else stream + update

    @staticmethod
    @_once
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        run, index = ctx.run, ctx.index
        block = run.chain.blocks[index]
        saved, units = ctx.saved_tensors
        with autocast(**run.autocast):
            t = run.step_back(index, saved, lambda: block.down_proj(units)).detach().requires_grad_()
            with torch.enable_grad():
                # A view: the hooks of PyTorch's FLOP counter do not accept a leaf as a module's input here.
                update = block(t.view_as(t), run.activation)
                t_gradient, *found = torch.autograd.grad(
                    update, [t, *_trained(block)], gradient.to(update.dtype), allow_unused=True
                )
        return None, None, *_gradients_of_inputs(run, gradient, t_gradient, index == 0), *found


def _through_activation(
    activation: Activation, before: Sequence[torch.Tensor], stream_gradient: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The units, `[..., rank]`, and the gradients of their pre-activations `before`, `[..., rank]` each."""
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in before]
        units = DLRBlock.units(leaves, activation)
    return units.detach(), torch.autograd.grad(units, leaves, (stream_gradient @ down).to(units.dtype))


def _matrix_gradients(
    parameters: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    t: torch.Tensor | None,
    units: torch.Tensor,
    unit_gradients: Sequence[torch.Tensor],
    stream_gradient: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of a block's five tensors, in the order of `_matrices`. None where none is needed."""
    gate, up = unit_gradients[0], unit_gradients[-1]
    # For each tensor: the gradient of what it produces, and its input (None for a bias).
    pairs = ((gate, t), (gate, None), (up, t), (up, None), (stream_gradient, units))
    found: list[torch.Tensor | None] = []
    for parameter, needed, (out, into) in zip(parameters, needs, pairs, strict=True):
        if not needed or parameter is None:
            found.append(None)
        elif into is None:
            found.append(out.flatten(0, -2).sum(0).to(parameter.dtype))
        else:
            found.append((out.flatten(0, -2).mT @ into.flatten(0, -2)).to(parameter.dtype))
    return found
