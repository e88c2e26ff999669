"""Chains in the form they are trained in: a group of layers at once, with a backward pass of its own.

Chains of different decoder layers have one shape and, in phase 1, nothing to do with each
other, so that a group of G of them is one batched computation (`bmm`) on `[G, tokens, hidden]`:

1. Gate and up of a block are one matrix; ranks that differ by one are padded with units of
   zeros, which no gradient ever reaches.
2. Forward: block after block, keeping each block's input and pre-activations.
3. Backward, by hand: the stream's gradient goes back block by block; the gradients of all
   blocks' reading matrices are then one batched product, and the activation's slope is taken
   for all blocks at once. Plain autograd does the same in some ten small operations a block.
4. Parameters are kept at unit rms, with their size apart, so that one step size, relative to
   each layer's own matrices, suits the whole group (Adam's step does not depend on a scale).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import load_side_by_side, side_by_side

Activation = Callable[[torch.Tensor], torch.Tensor]


class PackedChains(nn.Module):
    """The weights of `chains`, which must have one shape and activation.

    The chains themselves are left as they are; `unpack` writes what was learnt back into them.
    """

    def __init__(self, chains: Sequence[DLRNet]):
        super().__init__()
        first, weights = chains[0], [side_by_side(chain) for chain in chains]
        self.gated = weights[0].gate is not None
        self.activation: Activation = first.activation
        self.ranks = first.ranks
        read = torch.stack([self._read(each) for each in weights], 1)  # [depth, group, hidden, width]
        write = torch.stack([self._in_blocks(each.down.T) for each in weights], 1)  # [depth, group, rank, hidden]
        self.register_buffer("gains", read.new_tensor([chain.gain for chain in chains]).view(-1, 1, 1))
        self.register_buffer("read_rms", self._rms(read))
        self.register_buffer("write_rms", self._rms(write))
        self.read = nn.Parameter(read / self.read_rms)
        self.write = nn.Parameter(write / self.write_rms)
        self.register_buffer("bias_rms", ((self.read_rms**2 + self.write_rms**2) / 2).sqrt())
        self.read_bias = self.output_bias = None
        if weights[0].up_bias is not None:
            bias = torch.stack([self._read_bias(each) for each in weights], 1)  # [depth, group, 1, width]
            self.read_bias = nn.Parameter(bias / self.bias_rms)
        if weights[0].down_bias is not None:
            bias = torch.stack([each.down_bias.detach() for each in weights]).unsqueeze(1)
            self.output_bias = nn.Parameter(bias / self.bias_rms)  # [group, 1, hidden]

    def forward(self, x: torch.Tensor, coupling: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Map `x`, `[group, tokens, hidden]`, to the chains' outputs, in the dtype of `x`.

        Args:
            coupling: factor of the gains; 0 uncouples the blocks.
            dtype: of the computation; that of `x` if None.
        """
        compute = dtype or x.dtype
        bias = None if self.read_bias is None else (self.read_bias * self.bias_rms).to(compute)
        stream = _Chain.apply(
            x.to(compute),
            (self.read * self.read_rms).to(compute),
            bias,
            (self.write * self.write_rms).to(compute),
            (self.gains * coupling).to(compute),
            self.activation,
            self.gated,
        ).to(x.dtype)
        return stream if self.output_bias is None else stream + (self.output_bias * self.bias_rms).to(x.dtype)

    @torch.no_grad()
    def unpack(self, chains: Sequence[DLRNet]) -> None:
        """Write the weights into `chains`, one for each of the group."""
        read, write = self.read * self.read_rms, self.write * self.write_rms
        bias = None if self.read_bias is None else self.read_bias * self.bias_rms
        for index, chain in enumerate(chains):
            gate, up = self._gate_and_up(read[:, index].transpose(1, 2))
            gate_bias, up_bias = (None, None) if bias is None else self._gate_and_up(bias[:, index, 0])
            down_bias = None if self.output_bias is None else (self.output_bias * self.bias_rms)[index, 0]
            down = self._without_padding(write[:, index]).T
            load_side_by_side(chain, MLPWeights(up, down, gate, up_bias, gate_bias, down_bias))

    def _in_blocks(self, units: torch.Tensor) -> torch.Tensor:
        """Cut what hidden units have, `[intermediate, ...]`, into padded blocks: `[depth, rank, ...]`."""
        return nn.utils.rnn.pad_sequence(units.detach().split(self.ranks), batch_first=True)

    def _without_padding(self, blocks: torch.Tensor) -> torch.Tensor:
        """The way back: `[depth, rank, ...]` to `[intermediate, ...]`."""
        return torch.cat([block[:rank] for block, rank in zip(blocks, self.ranks, strict=True)])

    def _read(self, weights: MLPWeights) -> torch.Tensor:
        """Gate and up of each block, or up alone, as one matrix: `[depth, hidden, width]`."""
        parts = [self._in_blocks(part) for part in (weights.gate, weights.up) if part is not None]
        return torch.cat(parts, 1).transpose(1, 2)

    def _read_bias(self, weights: MLPWeights) -> torch.Tensor:
        """Their biases, `[depth, 1, width]`."""
        parts = [self._in_blocks(part) for part in (weights.gate_bias, weights.up_bias) if part is not None]
        return torch.cat(parts, 1).unsqueeze(1)

    def _gate_and_up(self, read: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What `_read` put together, `[depth, width, ...]`, as gate (None without one) and up, `[intermediate, ...]`."""
        parts = [self._without_padding(part) for part in read.split(max(self.ranks), 1)]
        return (parts[0], parts[1]) if self.gated else (None, parts[0])

    def _rms(self, matrices: torch.Tensor) -> torch.Tensor:
        """Rms of each layer's matrices without the padding, `[group, 1, 1]`."""
        filled = sum(self.ranks) / (max(self.ranks) * len(self.ranks))
        return (matrices.square().mean((0, 2, 3), keepdim=True)[0] / filled).sqrt().clamp_min(1e-12)


class _Chain(torch.autograd.Function):
    """`[group, tokens, hidden]` through a group of chains; see the top of this module."""

    @staticmethod
    def forward(ctx, x, read, bias, write, gains, activation, gated):
        inputs = x.new_empty(len(read), *x.shape)
        units_in = x.new_empty(len(read), *x.shape[:2], read.shape[-1])
        rank = write.shape[2]
        stream = torch.zeros_like(x)
        for block in range(len(read)):
            torch.addcmul(x, stream, gains, out=inputs[block])
            torch.bmm(inputs[block], read[block], out=units_in[block])
            if bias is not None:
                units_in[block] += bias[block]
            units = activation(units_in[block][..., :rank])
            if gated:
                units = units * units_in[block][..., rank:]
            stream.baddbmm_(units, write[block])
        ctx.save_for_backward(inputs, units_in, read, bias, write, gains)
        ctx.activation, ctx.gated = activation, gated
        return stream

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        inputs, units_in, read, bias, write, gains = ctx.saved_tensors
        rank = write.shape[2]
        activated, slope = _activation_and_slope(ctx.activation, units_in[..., :rank])
        if ctx.gated:
            up = units_in[..., rank:]
            units, slope = activated * up, slope * up
        else:
            units = activated
        gradient = gradient.clone()  # of the stream
        units_gradient = torch.empty_like(units_in)
        write_gradient = torch.empty_like(write)
        x_gradient = gradient.new_zeros(gradient.shape) if ctx.needs_input_grad[0] else None
        for block in reversed(range(len(read))):
            torch.bmm(units[block].transpose(1, 2), gradient, out=write_gradient[block])
            back = torch.bmm(gradient, write[block].transpose(1, 2))
            torch.mul(back, slope[block], out=units_gradient[block][..., :rank])
            if ctx.gated:
                torch.mul(back, activated[block], out=units_gradient[block][..., rank:])
            if block or x_gradient is not None:
                back = torch.bmm(units_gradient[block], read[block].transpose(1, 2))
                gradient.addcmul_(back, gains)
                if x_gradient is not None:
                    x_gradient += back
        read_gradient = torch.matmul(inputs.transpose(2, 3), units_gradient)
        bias_gradient = None if bias is None else units_gradient.sum(2, keepdim=True)
        return x_gradient, read_gradient, bias_gradient, write_gradient, None, None, None


def _activation_and_slope(activation: Activation, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An elementwise function's values and derivatives at `x`."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        values = activation(x)
        (slope,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slope
