"""Re-distillation: train ordinary MLPs on the chains' input-output maps, layer by layer.

One forward pass of the lock gives every layer's inputs and outputs; all students take a step on
them. Two starts use none of the lock's weights: noise (`scratch`), and noise with the second layer
solved for (`features`), which is much faster. `warm` starts from the closed-form solution.

The KL divergence to the lock is measured at points spaced evenly on a logarithmic axis of tokens. The
learning rate falls to zero at the end of a run, so only the last point shows what this many tokens are worth.
Earlier points show an attack that was stopped early. Each budget is a run of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from lockkit.attack.attacks.closed_form import LinearisedStack, RandomFeatures
from lockkit.attack.base import CannotRun, UnlockAttack, Unlocked
from lockkit.attack.cost import Cost, Meter
from lockkit.attack.rebuild import ordinary_model
from lockkit.measure.metrics import nmse
from lockkit.models.families import decoder_layers
from lockkit.training import shuffled_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.bench import Bench
    from lockkit.attack.config import AuditConfig

BATCH_ROWS = 4
FIRST_POINT = 1 / 64  # of the run's tokens
MAX_PASSES = 8  # over the unlabelled text
RATES = {"scratch": (1e-3, 3e-3), "features": (1e-3,), "warm": (1e-4, 3e-4)}
SOLVED = {"warm": LinearisedStack, "features": RandomFeatures}


class RedistillConfig(BaseModel):
    """Settings of a re-distillation."""

    start: Literal["scratch", "features", "warm"] = Field(
        "scratch", description="From noise, from `random-features`, or from `linearised-stack`."
    )
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate (Adam, cosine to zero).")
    tokens: int | None = Field(None, ge=1, description="Tokens to spend; by default the audit's.")
    budget: float | None = Field(
        None, gt=0, description="Tokens to spend, in multiples of what the lock took; in place of `tokens`."
    )
    points: int = Field(4, ge=1, description="Points of the curve of KL against tokens.")
    seed: int = Field(0, ge=0, description="Seed of the order of rows and of random weights.")


class Redistill(UnlockAttack):
    """Re-distillation into ordinary MLPs."""

    name = "redistill"
    description = "Train ordinary MLPs to reproduce the chains' outputs, from scratch or from the closed-form solution."
    reference = "this project; Hinton et al. 2015, arXiv 1503.02531"
    in_quick = True
    Config = RedistillConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[RedistillConfig]:
        """Every start at every of its learning rates and budgets; one in the suite `quick`."""
        if audit.suite == "quick" and not audit.redistill_budgets:
            # With so few tokens, noise alone would learn nothing.
            return [RedistillConfig(start="features", learning_rate=1e-3)]
        return [
            RedistillConfig(start=start, learning_rate=rate, budget=budget, points=8)
            for budget in audit.redistill_budgets or [None]
            for start in RATES
            for rate in RATES[start]
        ]

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Train one MLP per chain; the notes hold the curve of KL to the lock, in nats per token.

        Raises:
            CannotRun: the budget is in multiples of the lock's tokens, which are not known.
        """
        config, before = self.config, Cost()
        batch_tokens = BATCH_ROWS * bench.text_block
        rows = bench.unlabelled[: max(BATCH_ROWS, bench.config.redistill_tokens // bench.text_block)]
        wanted = max(1, self._tokens(bench) // batch_tokens)
        steps = min(wanted, max(1, MAX_PASSES * len(rows) // BATCH_ROWS))
        torch.manual_seed(config.seed)
        if config.start in SOLVED:
            attack = SOLVED[config.start]
            solved = attack(attack.trials(bench.config)[0]).unlock(locked, bench)
            model, before = solved.model, solved.cost
        else:
            model = ordinary_model(locked, bench.family)
        students = [layer.mlp for layer in decoder_layers(model)]
        model.requires_grad_(False)
        for student in students:
            student.requires_grad_(True)
        parameters = [p for student in students for p in student.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        batches = shuffled_batches(len(rows), BATCH_ROWS, config.seed)
        curve, spent, done = [], before, 0
        for point in measured_after(steps, config.points):
            with Meter(bench.device) as meter:
                for _ in range(point - done):
                    loss = _loss(locked, students, rows[next(batches)].to(bench.device))
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
            meter.cost.steps, meter.cost.tokens = point - done, (point - done) * batch_tokens
            spent, done = spent + meter.cost, point
            kl = bench.kl(model, "locked")
            curve.append({"tokens": spent.tokens, "flops": spent.flops, "seconds": spent.seconds, "kl_to_lock": kl})
        notes = {
            "curve": curve,
            "text_tokens": rows.numel(),
            "passes": steps * BATCH_ROWS / len(rows),
            "cut_short": steps < wanted,  # by MAX_PASSES
        }
        return Unlocked(model.requires_grad_(False), 1, spent, notes)

    def _tokens(self, bench: Bench) -> int:
        if self.config.budget is None:
            return self.config.tokens or bench.config.redistill_tokens
        recipe = bench.record.get("recipe") or {}
        if "tokens" not in recipe:
            raise CannotRun("the lock's lockkit.json, which says how many tokens it took, is not there")
        return round(self.config.budget * (recipe["tokens"] + recipe.get("end_to_end_tokens", 0)))


def measured_after(steps: int, points: int) -> list[int]:
    """Up to `points` numbers of steps, evenly spaced on a logarithmic axis; the last is `steps`."""
    shares = torch.logspace(torch.tensor(FIRST_POINT).log10().item(), 0, points).tolist() if points > 1 else [1.0]
    return sorted({max(1, round(share * steps)) for share in shares} | {steps})


def _loss(locked: PreTrainedModel, students: list[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """Sum over layers of the students' NMSE, on the lock's own activations for `ids`, `[rows, block]`."""
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
    return sum(nmse(student(x), y) for student, (x, y) in zip(students, seen, strict=True))
