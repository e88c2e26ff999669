"""Phase 2: all chains together, in place, on the KL divergence to the teacher's logits.

1. One model serves as teacher and student: `MLPSwitch` puts the MLPs or the chains into its
   decoder layers. Everything else is shared and frozen.
2. A step: logits with the MLPs, no gradient; logits with the chains; minimise
   KL(teacher || student), averaged over tokens (arXiv 2605.10777, phase 2).
3. Several times on the way and at the end, measure held-out KL and perplexity. The lowest KL
   wins, among states whose perplexity is no higher than phase 1's; phase 1's own counts too,
   so this phase never makes the lock worse.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lockkit.errors import DistillationError
from lockkit.lock.config import LockConfig
from lockkit.lock.optimiser import RelativeAdam
from lockkit.models.families import decoder_layers
from lockkit.progress import Progress

EVALUATIONS = 4
EVALUATION_ROWS = 4  # in one forward pass
MAX_GRADIENT_NORM = 1.0


class MLPSwitch:
    """The two sets of MLPs of one model, of which one is in place at a time."""

    def __init__(self, model: nn.Module, chains: list[nn.Module]):
        self.model = model
        self.layers = decoder_layers(model)
        self.teachers = [layer.mlp for layer in self.layers]
        self.chains = chains

    def use_teachers(self) -> None:
        self._put(self.teachers)

    def use_chains(self) -> None:
        self._put(self.chains)

    def _put(self, mlps: list[nn.Module]) -> None:
        for layer, mlp in zip(self.layers, mlps, strict=True):
            layer.mlp = mlp

    @torch.no_grad()
    def teacher_logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.use_teachers()
        return self.model(ids, use_cache=False).logits

    def student_logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.use_chains()
        return self.model(ids, use_cache=False).logits


@dataclass(frozen=True)
class Fidelity:
    """How the chains compare with the MLPs on held-out rows; perplexities are per token."""

    kl_divergence: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.original_perplexity

    def record(self) -> dict:
        return asdict(self) | {"perplexity_ratio": self.perplexity_ratio}


@dataclass(frozen=True)
class EndToEndResult:
    """What phase 2 reached; `best_step` 0 means that phase 1's state was kept."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    kl_divergence_before: float
    kl_divergence_after: float

    def record(self) -> dict:
        return asdict(self)


def mean_kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, averaged over all tokens of `[..., vocab]` logits."""
    log_student = F.log_softmax(student.float().flatten(0, -2), dim=-1)
    log_teacher = F.log_softmax(teacher.float().flatten(0, -2), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def measure_fidelity(switch: MLPSwitch, rows: torch.Tensor) -> Fidelity:
    """Compare chains and MLPs on rows of token ids, `[rows, block]`."""
    device = switch.model.device
    totals = torch.zeros(4, dtype=torch.float64)
    for ids in rows.split(EVALUATION_ROWS):
        ids = ids.to(device)
        teacher = switch.teacher_logits(ids)[:, :-1].float()
        student = switch.student_logits(ids)[:, :-1].float()
        targets = ids[:, 1:].flatten()
        totals += torch.tensor(
            [
                mean_kl_divergence(student, teacher).item() * targets.numel(),
                (student.argmax(-1) == teacher.argmax(-1)).sum().item(),
                F.cross_entropy(student.flatten(0, 1), targets, reduction="sum").item(),
                F.cross_entropy(teacher.flatten(0, 1), targets, reduction="sum").item(),
            ],
            dtype=torch.float64,
        )
    kl, agreement, loss, original_loss = (totals / (len(rows) * (rows.shape[1] - 1))).tolist()
    return Fidelity(kl, agreement, _exp(loss), _exp(original_loss))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def distil_end_to_end(
    switch: MLPSwitch, train: torch.Tensor, validation: torch.Tensor, config: LockConfig, progress: Progress
) -> EndToEndResult:
    """Train all chains on the logits; leave the best held-out state in place.

    Args:
        train, validation: rows of token ids, `[rows, block]`.

    Raises:
        DistillationError: the loss is no longer finite.
    """
    started = time.perf_counter()
    device = switch.model.device
    parameters = [p for chain in switch.chains for p in chain.parameters()]
    before = best = measure_fidelity(switch, validation)
    best_step = 0
    best_state = [p.detach().clone() for p in parameters]

    batch_rows = min(len(train), max(1, config.batch_tokens // train.shape[1]))
    steps = config.end_to_end_tokens // (batch_rows * train.shape[1])
    order = _row_order(len(train), steps * batch_rows, config.seed).split(batch_rows)
    switch.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = RelativeAdam(parameters, config.end_to_end_learning_rate, max(1, steps))
    evaluate_at = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    progress.start("end to end", steps)
    for step, chosen in enumerate(order[:steps], 1):
        ids = train[chosen].to(device)
        teacher = switch.teacher_logits(ids)
        loss = mean_kl_divergence(switch.student_logits(ids), teacher)
        loss.backward()
        if not torch.isfinite(loss):
            raise DistillationError(f"phase 2 diverged (loss {loss.item()}): lower --end-to-end-learning-rate")
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimiser.step()
        progress.advance(1, f"kl {loss.item():.5f}")
        if step in evaluate_at:
            held_out = measure_fidelity(switch, validation)
            if held_out.kl_divergence < best.kl_divergence and held_out.perplexity <= before.perplexity:
                best, best_step = held_out, step
                best_state = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best_state, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    tokens = steps * batch_rows * train.shape[1]
    progress.finish(f"held-out kl {before.kl_divergence:.5f} -> {best.kl_divergence:.5f}")
    seconds = time.perf_counter() - started
    return EndToEndResult(steps, best_step, tokens, seconds, before.kl_divergence, best.kl_divergence)


def _row_order(available: int, wanted: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available) or 1)]
    return torch.cat(passes)[:wanted]
