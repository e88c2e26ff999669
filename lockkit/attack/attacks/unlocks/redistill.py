"""Re-distillation: train ordinary MLPs to compute what the chains compute, each layer by itself.

One forward pass of the lock gives the inputs and outputs of all chains. Then each student, an ordinary MLP, takes one
step on those of its layer. Students start in one of three ways:

- `scratch`: random weights. `features`: a random first layer and a solved second layer, which is much
  faster. Both use none of the lock's weights.
- `warm`: the closed-form solution from the lock's weights.

The KL divergence to the lock is measured at points that are evenly spaced on a logarithmic axis of tokens. The
learning rate falls to zero at the end of a run. So only the last point shows what an attacker reaches with that many
tokens; earlier points belong to runs that were not finished. Each budget is a separate run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from lockkit.attack.attacks.unlocks.closed_form import LinearisedStack, RandomFeatures
from lockkit.attack.base import CannotRun, UnlockAttack, Unlocked
from lockkit.attack.cost import Cost, Meter
from lockkit.attack.rebuild import ordinary_model
from lockkit.measure.metrics import nmse
from lockkit.models.families import decoder_layers
from lockkit.training import shuffled_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.config import AuditConfig
    from lockkit.attack.subjects import Subjects

BATCH_ROWS = 4
FIRST_POINT = 1 / 64  # of the run's tokens
MAX_PASSES = 8  # over the unlabelled text
RATES = {"scratch": (1e-3, 3e-3), "features": (1e-3,), "warm": (1e-4, 3e-4)}
SOLVED = {"warm": LinearisedStack, "features": RandomFeatures}


class RedistillConfig(BaseModel):
    """Settings of a re-distillation."""

    start: Literal["scratch", "features", "warm"] = Field(
        "scratch", description="Initial weights: random, from `random-features`, or from `linearised-stack`."
    )
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate (Adam, cosine to zero).")
    tokens: int | None = Field(None, ge=1, description="Training tokens; by default those of the audit.")
    budget: float | None = Field(
        None, gt=0, description="Training tokens as a multiple of those of the lock; replaces `tokens`."
    )
    points: int = Field(4, ge=1, description="Points of the curve of KL against tokens.")
    seed: int = Field(0, ge=0, description="Seed of the order of rows and of random weights.")


class Redistill(UnlockAttack):
    """Re-distillation into ordinary MLPs."""

    name = "redistill"
    description = "Train ordinary MLPs to reproduce the chains' outputs, from scratch or from the closed-form solution."
    reference = "this project; Hinton et al. 2015, arXiv 1503.02531"
    Config = RedistillConfig
    config: RedistillConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[RedistillConfig]:
        """Every start at each of its learning rates and each budget; a single run in the suite `quick`."""
        if audit.suite == "quick" and not audit.redistill_budgets:
            # With so few tokens, random weights would learn nothing.
            return [RedistillConfig(start="features", learning_rate=1e-3)]
        budgets: list[float | None] = [*audit.redistill_budgets] or [None]
        return [
            RedistillConfig(start=start, learning_rate=rate, budget=budget, points=8)
            for budget in budgets
            for start in RATES
            for rate in RATES[start]
        ]

    def unlock(self, locked: PreTrainedModel, subjects: Subjects) -> Unlocked:
        """Train one MLP per chain. The notes contain the curve of KL(lock || model), in nats per token.

        Raises:
            CannotRun: the budget is a multiple of the lock's tokens, and their number is not known.
        """
        config = self.config
        batch_tokens = BATCH_ROWS * subjects.text_block
        rows = subjects.unlabelled[: max(BATCH_ROWS, subjects.config.redistill_tokens // subjects.text_block)]
        wanted = max(1, self._tokens(subjects) // batch_tokens)
        steps = min(wanted, max(1, MAX_PASSES * len(rows) // BATCH_ROWS))
        model, before = self._initial(locked, subjects)
        students: list[nn.Module] = [layer.mlp for layer in decoder_layers(model)]
        model.requires_grad_(False)
        for student in students:
            student.requires_grad_(True)
        parameters = [p for student in students for p in student.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        batches = shuffled_batches(len(rows), BATCH_ROWS, config.seed)
        curve, spent, done = [], before, 0
        for point in measured_after(steps, config.points):
            with Meter(subjects.device) as meter:
                for _ in range(point - done):
                    loss = _loss(locked, students, rows[next(batches)].to(subjects.device))
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
            meter.cost.steps, meter.cost.tokens = point - done, (point - done) * batch_tokens
            spent, done = spent + meter.cost, point
            kl = subjects.kl(model, "locked")
            curve.append({"tokens": spent.tokens, "flops": spent.flops, "seconds": spent.seconds, "kl_to_lock": kl})
        notes = {
            "curve": curve,
            "text_tokens": rows.numel(),
            "passes": steps * BATCH_ROWS / len(rows),
            "cut_short": steps < wanted,  # MAX_PASSES limited the number of steps
        }
        return Unlocked(model.requires_grad_(False), 1, spent, notes)

    def _initial(self, locked: PreTrainedModel, subjects: Subjects) -> tuple[PreTrainedModel, Cost]:
        """The model before training, and its cost."""
        torch.manual_seed(self.config.seed)
        if self.config.start not in SOLVED:
            return ordinary_model(locked, subjects.family), Cost()
        attack = SOLVED[self.config.start]
        solved = attack(attack.trials(subjects.config)[0]).unlock(locked, subjects)
        return solved.model, solved.cost

    def _tokens(self, subjects: Subjects) -> int:
        """The number of training tokens."""
        if self.config.budget is None:
            return self.config.tokens or subjects.config.redistill_tokens
        if not subjects.lock_tokens:
            raise CannotRun("the lock has no lockkit.json, which says how many tokens its distillation took")
        return round(self.config.budget * subjects.lock_tokens)


def measured_after(steps: int, points: int) -> list[int]:
    """Up to `points` numbers of steps, evenly spaced on a logarithmic axis. The last one is `steps`."""
    shares = torch.logspace(torch.tensor(FIRST_POINT).log10().item(), 0, points).tolist() if points > 1 else [1.0]
    return sorted({max(1, round(share * steps)) for share in shares} | {steps})


def _loss(locked: PreTrainedModel, students: list[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """The sum over layers of the students' NMSE, on the lock's own activations for `ids`, `[rows, block]`."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _m, args, out: seen.append((args[0].flatten(0, -2), out.flatten(0, -2))))
        for layer in decoder_layers(locked)
    ]
    try:
        with torch.no_grad():
            locked.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    losses = [nmse(student(x), y) for student, (x, y) in zip(students, seen, strict=True)]
    return sum(losses[1:], start=losses[0])
