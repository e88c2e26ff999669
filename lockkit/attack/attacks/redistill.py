"""Re-distillation: train ordinary MLPs on the chains' input-output maps, layer by layer.

One forward pass of the lock gives every layer's inputs and outputs; all students take a step on
them. They start from noise (`scratch`), or from the closed-form solution (`warm`).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, Field

from lockkit.attack.attacks.closed_form import CollapseConfig, LinearisedStack
from lockkit.attack.base import UnlockAttack, Unlocked
from lockkit.attack.cost import Cost, Meter
from lockkit.attack.rebuild import ordinary_model
from lockkit.lock.modulewise import nmse
from lockkit.models.families import decoder_layers

BATCH_ROWS = 4
CURVE_POINTS = 4


class RedistillConfig(BaseModel):
    start: Literal["scratch", "warm"] = Field("scratch", description="From noise, or from `linearised-stack`.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate (Adam, cosine to zero).")
    seed: int = Field(0, ge=0)


class Redistill(UnlockAttack):
    name = "redistill"
    description = "Train ordinary MLPs on the chains' maps, from scratch or from the closed-form solution."
    reference = "this project's first measurements of the lock; Hinton et al. 2015, arXiv 1503.02531"
    in_quick = True
    Config = RedistillConfig

    @classmethod
    def trials(cls, audit):
        if audit.suite == "quick":
            return [RedistillConfig()]
        rates = {"scratch": (1e-3, 3e-3), "warm": (1e-4, 3e-4)}
        return [RedistillConfig(start=start, learning_rate=rate) for start in rates for rate in rates[start]]

    def unlock(self, locked, bench) -> Unlocked:
        config, before = self.config, Cost()
        torch.manual_seed(config.seed)
        if config.start == "warm":
            solved = LinearisedStack(CollapseConfig()).unlock(locked, bench)
            model, before = solved.model, solved.cost
        else:
            model = ordinary_model(locked, bench.family)
        students = [layer.mlp for layer in decoder_layers(model)]
        model.requires_grad_(False)
        for student in students:
            student.requires_grad_(True)
        parameters = [p for student in students for p in student.parameters()]
        rows = bench.unlabelled[: max(BATCH_ROWS, bench.config.redistill_tokens // bench.text_block)]
        steps = max(1, bench.config.redistill_tokens // (BATCH_ROWS * bench.text_block))
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        generator = torch.Generator().manual_seed(config.seed)
        curve, spent = [], before
        for part in range(CURVE_POINTS):
            share = steps * (part + 1) // CURVE_POINTS - steps * part // CURVE_POINTS
            if not share:
                continue
            with Meter(bench.device) as meter:
                for _ in range(share):
                    chosen = torch.randint(len(rows), (BATCH_ROWS,), generator=generator)
                    loss = _loss(locked, students, rows[chosen].to(bench.device))
                    loss.backward()
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
            meter.cost.steps, meter.cost.tokens = share, share * BATCH_ROWS * bench.text_block
            spent = spent + meter.cost
            kl = bench.quality(model).kl_to_lock
            curve.append({"tokens": spent.tokens, "flops": spent.flops, "kl_to_lock": kl})
        return Unlocked(model.requires_grad_(False), 1, spent, {"curve": curve})


def _loss(locked, students: list, ids: torch.Tensor) -> torch.Tensor:
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
