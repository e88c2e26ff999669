"""Packed chains, the form used in training: a group of layers in one batched computation.

Chains of different decoder layers have the same shape, and in phase 1 they are independent. So a group of G chains is
one batched computation (`bmm`) on `[G, tokens, hidden]`:

1. Gate and up of a block are one matrix. Ranks that differ by one are padded with units of zeros, whose gradients are
   always zero.
2. Forward: run block after block, and save each block's input and pre-activations.
3. Backward, written by hand: propagate the stream's gradient block by block. The gradients of all gate and up matrices
   are then one batched product. The activation's derivative is computed for all blocks at once. Plain autograd takes
   about ten small operations per block instead.
4. Parameters are stored at unit rms, and their rms is stored separately. So one step size, relative to the rms of each
   layer's matrices, suits the whole group (Adam's step does not depend on the scale of the gradient). Matrices of zeros
   have the rms 0, so they stay zero in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import load_side_by_side, side_by_side

SMALLEST_RMS = 1e-12  # of matrices that are not all zero
Activation = Callable[[torch.Tensor], torch.Tensor]


class PackedChains(nn.Module):
    """The weights of a group of chains of one shape and activation, as parameters of unit rms.

    The chains are copied, not changed. `unpack` writes the trained weights into chains.

    Attributes:
        read: gate and up of each block, `[depth, group, hidden, width]`.
        write: down of each block, `[depth, group, rank, hidden]`.
        read_bias: `[depth, group, 1, width]`, or None.
        output_bias: `[group, 1, hidden]`, or None.
        gains: the chains' gains, `[group, 1, 1]`.
        read_rms, write_rms, bias_rms: factors of the parameters, `[group, 1, 1]` each.
    """

    gains: torch.Tensor
    read_rms: torch.Tensor
    write_rms: torch.Tensor
    bias_rms: torch.Tensor

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
        self.read = nn.Parameter(read / self.read_rms.clamp_min(SMALLEST_RMS))
        self.write = nn.Parameter(write / self.write_rms.clamp_min(SMALLEST_RMS))
        self.register_buffer("bias_rms", ((self.read_rms**2 + self.write_rms**2) / 2).sqrt())
        self.read_bias: nn.Parameter | None = None
        self.output_bias: nn.Parameter | None = None
        if weights[0].up_bias is not None:
            bias = torch.stack([self._read_bias(each) for each in weights], 1)  # [depth, group, 1, width]
            self.read_bias = nn.Parameter(bias / self.bias_rms.clamp_min(SMALLEST_RMS))
        down_biases = [each.down_bias.detach() for each in weights if each.down_bias is not None]
        if down_biases:
            bias = torch.stack(down_biases).unsqueeze(1)
            self.output_bias = nn.Parameter(bias / self.bias_rms.clamp_min(SMALLEST_RMS))  # [group, 1, hidden]

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The outputs of the chains, `[group, tokens, hidden]`, in the dtype of `x`.

        Args:
            x: each chain's own input, `[group, tokens, hidden]`.
            dtype: of the computation; None for that of `x`.
        """
        compute = dtype or x.dtype
        bias = None if self.read_bias is None else (self.read_bias * self.bias_rms).to(compute)
        stream = _Chain.apply(
            x.to(compute),
            (self.read * self.read_rms).to(compute),
            bias,
            (self.write * self.write_rms).to(compute),
            self.gains.to(compute),
            self.activation,
            self.gated,
        ).to(x.dtype)
        return stream if self.output_bias is None else stream + (self.output_bias * self.bias_rms).to(x.dtype)

    @torch.no_grad()
    def unpack(self, chains: Sequence[DLRNet]) -> None:
        """Copy the weights into `chains`, one per member of the group."""
        read, write = self.read * self.read_rms, self.write * self.write_rms
        bias = None if self.read_bias is None else self.read_bias * self.bias_rms
        for index, chain in enumerate(chains):
            gate, up = self._gate_and_up(read[:, index].transpose(1, 2))
            gate_bias, up_bias = (None, None) if bias is None else self._gate_and_up(bias[:, index, 0])
            down_bias = None if self.output_bias is None else (self.output_bias * self.bias_rms)[index, 0]
            down = self._without_padding(write[:, index]).T
            load_side_by_side(chain, MLPWeights(up, down, gate, up_bias, gate_bias, down_bias))

    def _in_blocks(self, units: torch.Tensor) -> torch.Tensor:
        """Split a tensor over hidden units, `[intermediate, ...]`, into padded blocks, `[depth, rank, ...]`."""
        return nn.utils.rnn.pad_sequence(units.detach().split(self.ranks), batch_first=True)

    def _without_padding(self, blocks: torch.Tensor) -> torch.Tensor:
        """The inverse of `_in_blocks`: `[depth, rank, ...]` to `[intermediate, ...]`."""
        return torch.cat([block[:rank] for block, rank in zip(blocks, self.ranks, strict=True)])

    def _read(self, weights: MLPWeights) -> torch.Tensor:
        """Gate and up of each block, or up alone, as one matrix: `[depth, hidden, width]`."""
        parts = [self._in_blocks(part) for part in (weights.gate, weights.up) if part is not None]
        return torch.cat(parts, 1).transpose(1, 2)

    def _read_bias(self, weights: MLPWeights) -> torch.Tensor:
        """The biases of gate and up, or of up alone: `[depth, 1, width]`."""
        parts = [self._in_blocks(part) for part in (weights.gate_bias, weights.up_bias) if part is not None]
        return torch.cat(parts, 1).unsqueeze(1)

    def _gate_and_up(self, read: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The inverse of `_read`: `[depth, width, ...]` to gate (or None) and up, `[intermediate, ...]` each."""
        parts = [self._without_padding(part) for part in read.split(max(self.ranks), 1)]
        return (parts[0], parts[1]) if self.gated else (None, parts[0])

    def _rms(self, matrices: torch.Tensor) -> torch.Tensor:
        """Rms of each chain's `matrices`, `[depth, group, ...]`, without the padding: `[group, 1, 1]`."""
        filled = sum(self.ranks) / (max(self.ranks) * len(self.ranks))
        return (matrices.square().mean((0, 2, 3), keepdim=True)[0] / filled).sqrt()


class _Chain(torch.autograd.Function):
    """The stream after the last block of a group of chains, `[group, tokens, hidden]`; see the top of this module."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        read: torch.Tensor,
        bias: torch.Tensor | None,
        write: torch.Tensor,
        gains: torch.Tensor,
        activation: Activation,
        gated: bool,
    ) -> torch.Tensor:
        inputs = x.new_empty(len(read), *x.shape)
        pre_activations = x.new_empty(len(read), *x.shape[:2], read.shape[-1])
        rank = write.shape[2]
        stream = torch.zeros_like(x)
        for block in range(len(read)):
            torch.addcmul(x, stream, gains, out=inputs[block])
            torch.bmm(inputs[block], read[block], out=pre_activations[block])
            if bias is not None:
                pre_activations[block] += bias[block]
            units = activation(pre_activations[block][..., :rank])
            if gated:
                units = units * pre_activations[block][..., rank:]
            stream.baddbmm_(units, write[block])
        ctx.save_for_backward(inputs, pre_activations, read, bias, write, gains)
        ctx.activation, ctx.gated = activation, gated
        return stream

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, pre_activations, read, bias, write, gains = ctx.saved_tensors
        rank = write.shape[2]
        activated, derivative = _activation_and_derivative(ctx.activation, pre_activations[..., :rank])
        if ctx.gated:
            up = pre_activations[..., rank:]
            units, derivative = activated * up, derivative * up
        else:
            units = activated
        gradient = gradient.clone()  # of the stream; changed in place below
        pre_gradient = torch.empty_like(pre_activations)
        write_gradient = torch.empty_like(write)
        x_gradient = gradient.new_zeros(gradient.shape) if ctx.needs_input_grad[0] else None
        for block in reversed(range(len(read))):
            torch.bmm(units[block].transpose(1, 2), gradient, out=write_gradient[block])
            unit_gradient = torch.bmm(gradient, write[block].transpose(1, 2))
            torch.mul(unit_gradient, derivative[block], out=pre_gradient[block][..., :rank])
            if ctx.gated:
                torch.mul(unit_gradient, activated[block], out=pre_gradient[block][..., rank:])
            if block or x_gradient is not None:
                t_gradient = torch.bmm(pre_gradient[block], read[block].transpose(1, 2))
                gradient.addcmul_(t_gradient, gains)
                if x_gradient is not None:
                    x_gradient += t_gradient
        read_gradient = torch.matmul(inputs.transpose(2, 3), pre_gradient)
        bias_gradient = None if bias is None else pre_gradient.sum(2, keepdim=True)
        return x_gradient, read_gradient, bias_gradient, write_gradient, None, None, None


def _activation_and_derivative(activation: Activation, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and derivatives of an elementwise function at `x`."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        values = activation(x)
        (derivative,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), derivative
