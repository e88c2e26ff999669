"""Phase 1: distil each teacher MLP into a chain, on the teacher's activations.

The input is a group of layers and the inputs of their MLPs. A group is one layer, or as many layers as fit into memory
where batching them is faster.

1. Choose the gain from the ratio of the input's rms to the output's (`coupling`). Create the chains with the teacher's
   units (initialise.py), fitted to what each block reads (least_squares.py), or with noise. A teacher whose outputs are
   all zero gets a chain of zeros.
2. Train on `tokens` tokens in random order. The loss is the NMSE: the squared error over the variance of the teacher's
   outputs (arXiv 2605.10777, phase 1).
3. Measure the NMSE on held-out activations. If training made it worse, keep the chain from before training.
4. If a loss diverges, start again at half the step size.

Layers are independent: each has its own seed, order of tokens and step size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.errors import DistillationError, UsageError
from lockkit.lock.config import LockConfig
from lockkit.lock.initialise import set_to_zero, start_from_noise, start_from_teacher
from lockkit.lock.least_squares import fit_to_stream
from lockkit.lock.optimiser import ScheduledAdam
from lockkit.lock.packed import PackedChains
from lockkit.lock.sizes import FIT_TOKENS
from lockkit.measure.metrics import nmse
from lockkit.measure.totals import NMSE
from lockkit.progress import Progress
from lockkit.training import shuffled_order

EVALUATION_TOKENS = 4096  # in one forward pass
SAMPLE_TOKENS = 4096
REPORT_EVERY = 20  # steps; reading a loss synchronises the GPU
DIVERGED_NMSE = 10.0  # a constant output, the teacher's mean, has NMSE 1
ATTEMPTS = 4  # each at half the step size of the one before


@dataclass(frozen=True)
class LayerResult:
    """The result of phase 1 on one layer.

    Attributes:
        layer: index of the decoder layer.
        gain: factor of the stream in a block's input.
        coupling: the coupling that the gain was chosen for; None if the recipe gives the gain.
        start_nmse: normalised mean squared error on held-out activations before training.
        nmse: the same after training.
        tokens: tokens that the chain was trained on; 0 if training made it worse.
        learning_rate: of the attempt that converged.
        seconds: wall time.
    """

    layer: int
    gain: float
    coupling: float | None
    start_nmse: float
    nmse: float
    tokens: int
    learning_rate: float
    seconds: float

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class LayerTask:
    """One layer to distil.

    Attributes:
        layer: index of the decoder layer.
        teacher: its MLP.
        weights: the MLP's weights.
        empty_chain: returns an untrained chain, given its gain.
        train, validation: inputs of the MLP, `[tokens, hidden]` each, in memory or in memory-mapped files.
        coupling: of the chain, unless the recipe gives a gain.
    """

    layer: int
    teacher: nn.Module
    weights: MLPWeights
    empty_chain: Callable[[float], DLRNet]
    train: torch.Tensor
    validation: torch.Tensor
    coupling: float

    def seed(self, config: LockConfig) -> int:
        """The layer's own seed, the same in every run of the recipe."""
        return config.seed * 100_003 + self.layer


def distil_layers(
    tasks: Sequence[LayerTask], config: LockConfig, progress: Progress
) -> list[tuple[DLRNet, LayerResult]]:
    """Distil the MLPs of a group of layers into chains, in one batched computation.

    Args:
        tasks: the layers.
        config: the recipe.
        progress: reports steps and losses.

    Returns:
        The chain and the result of each layer, in order.

    Raises:
        DistillationError: a loss diverged even at the smallest of the `ATTEMPTS` step sizes.
    """
    names = f"layer {tasks[0].layer}" if len(tasks) == 1 else f"layers {tasks[0].layer}-{tasks[-1].layer}"
    for attempt in range(ATTEMPTS - 1):
        rate = config.phase_1_learning_rate / 2**attempt
        try:
            return _distil(tasks, config, rate, names, progress)
        except DistillationError:
            progress.finish(f"diverged at learning rate {rate:g}, trying again at {rate / 2:g}")
    return _distil(tasks, config, config.phase_1_learning_rate / 2 ** (ATTEMPTS - 1), names, progress)


def _distil(
    tasks: Sequence[LayerTask], config: LockConfig, learning_rate: float, names: str, progress: Progress
) -> list[tuple[DLRNet, LayerResult]]:
    started = time.perf_counter()
    progress.start(names, _steps(tasks, config))
    chains = [start_chain(task, config) for task in tasks]
    before = _held_out(chains, tasks)
    packed = PackedChains(chains)
    _train(packed, tasks, config, learning_rate, progress)
    trained = copy.deepcopy(chains)
    packed.unpack(trained)
    after = _held_out(trained, tasks)
    _require_converging(torch.tensor(after), tasks)
    seconds = (time.perf_counter() - started) / len(tasks)
    tokens = _steps(tasks, config) * _batch(tasks, config)
    results = []
    for number, task in enumerate(tasks):
        better = after[number] < before[number] or math.isnan(before[number])
        chains[number] = trained[number] if better else chains[number]
        results.append(
            LayerResult(
                layer=task.layer,
                gain=chains[number].gain,
                coupling=None if config.gain else task.coupling,
                start_nmse=before[number],
                nmse=after[number] if better else before[number],
                tokens=tokens if better else 0,
                learning_rate=learning_rate,
                seconds=seconds,
            )
        )
    progress.finish("nmse " + ", ".join(f"{result.nmse:.5f}" for result in results))
    return list(zip(chains, results, strict=True))


def _batch(tasks: Sequence[LayerTask], config: LockConfig) -> int:
    return min(config.batch_tokens, len(tasks[0].train))


def _steps(tasks: Sequence[LayerTask], config: LockConfig) -> int:
    return max(1, config.tokens // _batch(tasks, config))


def _train(
    packed: PackedChains, tasks: Sequence[LayerTask], config: LockConfig, learning_rate: float, progress: Progress
) -> None:
    """Train a group of chains, all steps.

    Raises:
        DistillationError: a loss diverged.
    """
    device = tasks[0].weights.up.device
    batch, steps, available = _batch(tasks, config), _steps(tasks, config), len(tasks[0].train)
    orders = [shuffled_order(available, steps * batch, task.seed(config)).split(batch) for task in tasks]
    optimiser = ScheduledAdam(packed.parameters(), learning_rate, steps)
    for step in range(steps):
        x = torch.stack([task.train[order[step]].to(device) for task, order in zip(tasks, orders, strict=True)])
        with torch.no_grad():
            y = torch.stack([task.teacher(inputs) for task, inputs in zip(tasks, x, strict=True)])
        losses = nmse(packed(x, config.torch_compute_dtype), y)
        losses.sum().backward()
        optimiser.step(step)
        if step % REPORT_EVERY == 0 or step == steps - 1:
            _require_converging(losses, tasks)
            progress.advance(min(REPORT_EVERY, steps - step), f"nmse {losses.mean().item():.5f}")


def _held_out(chains: Sequence[DLRNet], tasks: Sequence[LayerTask]) -> list[float]:
    return [chain_nmse(chain, task.teacher, task.validation) for chain, task in zip(chains, tasks, strict=True)]


@torch.no_grad()
def start_chain(task: LayerTask, config: LockConfig) -> DLRNet:
    """The chain of a layer before training, with its gain and initial weights.

    Raises:
        UsageError: the teacher's outputs are not finite, or too large for their squares to be finite.
    """
    device = task.weights.up.device
    sample = task.train[:SAMPLE_TOKENS].to(device)
    outputs = task.teacher(sample)
    if not outputs.isfinite().all():
        raise UsageError(
            f"the MLP of layer {task.layer} of MODEL computes values that are not finite on this text: change MODEL or "
            "--data"
        )
    if not nmse(torch.zeros_like(outputs), outputs).isfinite():
        raise UsageError(
            f"the MLP of layer {task.layer} of MODEL computes values up to {outputs.abs().max().item():.2g}, whose "
            "squares are too large for float32: change MODEL"
        )
    gain = config.gain or _gain(sample, outputs, task.coupling)
    chain = task.empty_chain(gain).to(device).requires_grad_(False)
    if config.init == "teacher":
        start_from_teacher(chain, task.weights, sample)
        chosen = shuffled_order(len(task.train), min(FIT_TOKENS, len(task.train)), task.seed(config))
        fit_to_stream(chain, task.train[chosen].to(device))
    else:
        start_from_noise(chain, sample, outputs, task.seed(config))
    if not any(task.teacher(part.to(device)).any() for part in task.train.split(EVALUATION_TOKENS)):
        set_to_zero(chain)
    return chain


def _gain(inputs: torch.Tensor, outputs: torch.Tensor, coupling: float) -> float:
    """The gain at which the stream in a block's input has the rms `coupling` times that of the `inputs`.

    It is 1 where the inputs or the outputs are zero, since any gain does.
    """
    rms = _rms(inputs), _rms(outputs)
    return coupling * (rms[0] / rms[1]) if all(rms) else 1.0


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


@torch.no_grad()
def chain_nmse(chain: nn.Module, teacher: nn.Module, inputs: torch.Tensor) -> float:
    """NMSE of a chain against the teacher on `inputs`, `[tokens, hidden]`."""
    device, found = next(chain.parameters()).device, NMSE()
    for part in inputs.split(EVALUATION_TOKENS):
        part = part.to(device)
        found.add(chain(part), teacher(part))
    return found.value


def _require_converging(errors: torch.Tensor, tasks: Sequence[LayerTask]) -> None:
    for error, task in zip(errors.tolist(), tasks, strict=True):
        if not error < DIVERGED_NMSE:
            raise DistillationError(
                f"distillation of layer {task.layer} diverged (NMSE {error:.3g}): lower --learning-rate or --coupling"
            )
