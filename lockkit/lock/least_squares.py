"""Fit the units of a chain to what its blocks read, in closed form.

The teacher's units read the MLP's input `x`. The units of block l read `t = x + gain * s`, where `s` is the sum of the
updates before it. So the teacher's matrices are wrong for `t`. In a language model, `s` is close to a linear function of
`x`, and a linear map recovers nearly all of `x` from `t`. For the blocks in order:

1. B = E[x t'] (E[t t'] + r I)^-1 is the least-squares map from `t` to `x` (ridge regression; the ridge r also multiplies
   the identity in the first factor, so B = I for the first block).
2. Multiply the block's gate and up matrices by B. They then read from `t` nearly what they read from `x`.
3. Run the block on all tokens, and add its update to the stream.
4. Update both moments. The update of a block of `rank` units has that rank, so this takes products with `rank` columns
   instead of `hidden` columns.

For all blocks this costs about as much as a forward pass on the same tokens, and there is no step size to choose. What
is left is the part of the stream that is not linear in `x`.
"""

from __future__ import annotations

import torch

from lockkit.dlr.net import DLRBlock, DLRNet
from lockkit.dlr.view import block_weights

RIDGE_SHARE = 1e-4  # of the mean square of the inputs
TOKENS_IN_A_BATCH = 4096


@torch.no_grad()
def fit_to_stream(chain: DLRNet, inputs: torch.Tensor) -> None:
    """Multiply the gate and up matrices of every block by the least-squares map from the block's input to `x`.

    Args:
        chain: its blocks have the teacher's units (`start_from_teacher`); changed in place.
        inputs: inputs of the MLP, `[tokens, hidden]`, on the chain's device. At least a few times `hidden` tokens.
    """
    stream_input = inputs.clone()  # t, [tokens, hidden]
    moment = _moment(inputs, inputs)  # sum of t t'
    cross = moment.clone()  # sum of x t'
    ridge = RIDGE_SHARE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if not ridge.any():
        return
    for block in chain.blocks:
        weights = block_weights(block)
        recover = torch.linalg.solve(moment + ridge, (cross + ridge).T).T.to(inputs.dtype)
        for matrix in (weights.gate, weights.up):
            if matrix is not None:
                matrix.copy_(matrix @ recover)
        down = chain.gain * weights.down
        units = torch.cat([_units(chain, block, part) for part in stream_input.split(TOKENS_IN_A_BATCH)])
        change = _moment(stream_input, units) @ down.T.to(moment.dtype)
        squares = down.to(moment.dtype) @ _moment(units, units) @ down.T.to(moment.dtype)
        moment += change + change.T + squares
        cross += _moment(inputs, units) @ down.T.to(moment.dtype)
        stream_input.addmm_(units, down.T)


def _units(chain: DLRNet, block: DLRBlock, t: torch.Tensor) -> torch.Tensor:
    return block.units(block.pre_activations(t), chain.activation)


def _moment(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of the outer products of two `[tokens, ...]` tensors, float64."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(TOKENS_IN_A_BATCH), right.split(TOKENS_IN_A_BATCH), strict=True):
        total += a.T @ b
    return total
