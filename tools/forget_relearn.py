"""How much of D a model of forget_bench.py holds: what it costs to teach D again, and what D in its prompt is worth.

The levels are the same for all models. On D's held-out text, G starts at one loss and B has another. The level of 90 %
lies 90 % of the way from G's to B's.

Relearning uses attacks of the audit (lockkit/attack) on D's training text, at several constant rates. The cost to a level is that of
the cheapest run. Between two points of a curve, the loss is taken to fall linearly with the tokens.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from lockkit.attack.attacks.gradient.adapters import Lora, LoraConfig
from lockkit.attack.attacks.gradient.full_ft import FullFinetune
from lockkit.attack.finetune import FinetuneConfig, FinetuneResult, finetune
from lockkit.attack.losses import held_out_loss
from lockkit.attack.subjects import Subjects
from lockkit.attack.tasks import IGNORED, Rows, Task

SHARES = (0.5, 0.75, 0.9, 1.0)
BATCH_ROWS = 4
EVERY = 8  # steps from one point of a curve to the next
FINE_STEPS = 8  # first steps of a model that is quick: a point after each
HELD_OUT_ROWS = 32  # of D, in a curve
QUALITY_ROWS = 160  # of A and of D, at most, in the quality of a model
NO_SUBJECTS = cast(Subjects, None)  # these attacks need none
Curve = list[tuple[int, float]]  # tokens, held-out loss


@dataclass(frozen=True)
class Attack:
    """One way to relearn: `full-ft` or `lora`, and its learning rate."""

    name: str
    rate: float

    def __str__(self) -> str:
        return f"{self.name} {self.rate:g}"


ATTACKS = (Attack("full-ft", 3e-3), Attack("full-ft", 1e-3), Attack("lora", 1e-2), Attack("lora", 3e-3))


def language_rows(ids: torch.Tensor) -> Rows:
    """Rows of text, `[rows, block]`, in which every token but the first counts."""
    labels = ids.clone()
    labels[:, 0] = IGNORED
    return Rows(ids, labels)


def task_of(rows: dict[str, torch.Tensor]) -> Task:
    """D as a task of the audit. Its held-out part is the first `HELD_OUT_ROWS` rows, so that points are cheap."""
    return Task("D", language_rows(rows["D"]), language_rows(rows["D held out"][:HELD_OUT_ROWS]), 0, 0)


def levels(gold_start: float, b: float) -> dict[float, float]:
    """The losses of `SHARES` of the way from G's loss before it learns D to B's loss."""
    return {share: gold_start - share * (gold_start - b) for share in SHARES}


def tokens_to(level: float, curve: Curve) -> float | None:
    """Tokens until a curve first reaches a loss; None if it does not."""
    if curve[0][1] <= level:
        return 0.0
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= level:
            return before + (after - before) * (high - level) / (high - low)
    return None


def cheapest(level: float, curves: Iterable[Curve]) -> float | None:
    """Tokens of the cheapest run to a loss; None if no run reaches it."""
    return min((tokens for curve in curves if (tokens := tokens_to(level, curve)) is not None), default=None)


def relearn(model: PreTrainedModel, attack: Attack, task: Task, stop: float, half: float, steps: int) -> Curve:
    """One run on a copy of a model.

    Args:
        model: not changed.
        attack: what is trained, and the rate.
        task: D.
        stop: end at this held-out loss.
        half: where the first point with training is below this loss, the first steps are run again with a point after each.
        steps: at most.
    """

    def run(steps: int, evaluations: int) -> Curve:
        config = {
            "learning_rate": attack.rate, "steps": steps, "batch_rows": BATCH_ROWS, "schedule": "constant",
            "evaluations": evaluations, "stop_loss": stop,
        }  # fmt: skip
        result = _run(copy.deepcopy(model), attack.name, task, config)
        return [(point.tokens, point.loss) for point in result.curve]

    curve = run(steps, steps // EVERY)
    if len(curve) > 1 and curve[1][1] < half:
        fine = run(FINE_STEPS, FINE_STEPS)
        curve = fine + [point for point in curve if point[0] > fine[-1][0]]
    return curve


def _run(model: PreTrainedModel, name: str, task: Task, settings: dict[str, Any]) -> FinetuneResult:
    if name == "lora":
        config: FinetuneConfig = LoraConfig(**settings)
        training = Lora(config).prepare(model, NO_SUBJECTS)
    else:
        config = FinetuneConfig(**settings)
        training = FullFinetune(config).prepare(model, NO_SUBJECTS)
    return finetune(training, task, config)


@torch.no_grad()
def in_context(model: nn.Module, rows: dict[str, torch.Tensor], context: int) -> dict[str, float]:
    """Losses on D's held-out text after other text, in nats per token.

    The text is that of the second part of each held-out row. Before it come `context` tokens of A or of D's other text.
    So the text is the same in both, at the same positions, and only what stands before it differs.
    """
    text = rows["D held out"][:, context:]
    found = {}
    for name, part in (("after A", "A held out"), ("after D", "D context")):
        before = rows[part][: len(text), :context]
        ids = torch.cat([before, text[: len(before)]], 1)
        total = 0.0
        for batch in ids.split(8):
            logits = model(input_ids=batch, use_cache=False).logits[:, context - 1 : -1]
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, context:].flatten(), reduction="sum").item()
        found[name] = total / ids[:, context:].numel()
    return found


def quality(model: nn.Module, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Held-out losses of a model on A and D, and its perplexity on A."""
    cpu = torch.device("cpu")
    a, d = (held_out_loss(model, language_rows(rows[f"{name} held out"][:QUALITY_ROWS]), cpu) for name in "AD")
    start = held_out_loss(model, task_of(rows).held_out, cpu)
    return {"loss on A": a, "perplexity on A": math.exp(a), "loss on D": d, "loss on the task": start}
