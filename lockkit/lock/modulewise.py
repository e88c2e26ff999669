"""Phase 1: every chain learns its own teacher MLP's map, on the teacher's activations.

For one layer, given its MLP's inputs:

1. Choose the gain that gives the stream its share of the input (`coupling`), and build the
   chain, from the teacher's units or from noise (lockkit/lock/initialise.py).
2. For `tokens` tokens in random order: minimise the squared error over the teacher's output
   variance (NMSE; arXiv 2605.10777, phase 1). With `init: continuation`, the coupling between
   blocks rises linearly from 0 to 1 over the first part of the steps.
3. Measure the NMSE on held-out activations, with full coupling.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import nn

from lockkit.dlr.net import DLRNet
from lockkit.errors import DistillationError
from lockkit.lock.config import LockConfig
from lockkit.lock.initialise import build_chain, start_from_noise, start_from_teacher
from lockkit.lock.optimiser import RelativeAdam
from lockkit.models.families import MLPWeights
from lockkit.progress import Progress

EVALUATION_TOKENS = 4096  # in one forward pass
SAMPLE_TOKENS = 4096


@dataclass(frozen=True)
class LayerResult:
    """What phase 1 reached on one layer."""

    layer: int
    gain: float
    nmse: float
    tokens: int
    seconds: float

    def record(self) -> dict:
        return asdict(self)


def distil_layer(
    layer: int,
    teacher: nn.Module,
    weights: MLPWeights,
    train: torch.Tensor,
    validation: torch.Tensor,
    config: LockConfig,
    progress: Progress,
) -> tuple[DLRNet, LayerResult]:
    """Distil one MLP into a chain.

    Args:
        teacher: the MLP, `[..., hidden]` to `[..., hidden]`.
        train, validation: inputs of the MLP, `[tokens, hidden]`, on the CPU.

    Raises:
        DistillationError: the loss is no longer finite.
    """
    started = time.perf_counter()
    device = weights.up.device
    seed = config.seed * 100_003 + layer  # layers differ, runs do not
    activation = getattr(teacher, "act_fn", None) or teacher.activation_fn
    sample = train[:SAMPLE_TOKENS].to(device)
    with torch.no_grad():
        sample_outputs = teacher(sample)
    gain = config.gain or config.coupling * (_rms(sample) / _rms(sample_outputs))
    chain = build_chain(weights.shape, config.depth, gain, activation).to(device)
    if config.init == "continuation":
        start_from_teacher(chain, weights, seed)
    else:
        start_from_noise(chain, sample, sample_outputs, seed)

    batch = min(config.batch_tokens, len(train))
    steps = max(1, config.tokens // batch)
    optimiser = RelativeAdam(chain.parameters(), config.learning_rate, steps)
    ramp_steps = config.ramp_share * steps if config.init == "continuation" else 0
    order = _token_order(len(train), steps * batch, seed).split(batch)
    progress.start(f"layer {layer}", steps)
    for step, chosen in enumerate(order):
        x = train[chosen].to(device)
        with torch.no_grad():
            y = teacher(x)
        ramp = min(1.0, (step + 1) / ramp_steps) if ramp_steps else 1.0
        loss = nmse(chain(x, gain * ramp), y)
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == steps - 1:
            _require_finite(loss, layer)
            progress.advance(20 if step + 20 < steps else steps - step, f"nmse {loss.item():.4f}")
    result = LayerResult(
        layer, gain, chain_nmse(chain, teacher, validation), steps * batch, time.perf_counter() - started
    )
    progress.finish(f"nmse {result.nmse:.5f}")
    return chain.requires_grad_(False), result


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def nmse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error over the variance of the teacher's outputs, both `[tokens, hidden]`."""
    centred = teacher - teacher.mean(0)
    return (student - teacher).square().mean() / centred.square().mean()


@torch.no_grad()
def chain_nmse(chain: DLRNet, teacher: nn.Module, inputs: torch.Tensor) -> float:
    """NMSE of a chain on `inputs`, `[tokens, hidden]`, at full coupling."""
    device = next(chain.parameters()).device
    parts = [part.to(device) for part in inputs.split(EVALUATION_TOKENS)]
    outputs = torch.cat([teacher(part) for part in parts])
    return nmse(torch.cat([chain(part) for part in parts]), outputs).item()


def _token_order(available: int, wanted: int, seed: int) -> torch.Tensor:
    """Indices of `wanted` tokens: whole random passes over those available."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
    return torch.cat(passes)[:wanted]


def _require_finite(loss: torch.Tensor, layer: int) -> None:
    if not torch.isfinite(loss):
        raise DistillationError(
            f"distillation of layer {layer} diverged (loss {loss.item()}): lower --learning-rate or --coupling"
        )
