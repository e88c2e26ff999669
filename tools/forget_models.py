"""The models of forget_bench.py: B and G from scratch, and the candidates that are made from B.

B is trained on A and D, G ("gold") on A alone. A step of B has the rows of A that the same step of G has, and rows of D
besides. So both have seen the same tokens of A, in the same order, from the same initial weights.

A candidate is made from B with text of A only; unlearning alone reads D. Every training resumes from its last saved state,
and a finished model is kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from train_demo_model import learning_rate_factor, make_model, make_optimizers

from lockkit.training import shuffled_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAVE_EVERY = 32  # steps
WARM_UP = 40  # steps, at most; a short run has less
LossOf = Callable[[nn.Module, int], torch.Tensor]  # from the model and the number of a step to the loss


@dataclass(frozen=True)
class Shape:
    """A model and its pretraining.

    Attributes:
        hidden, intermediate, layers, heads: of the model.
        block: tokens in a row.
        rows_a, rows_d: rows of A and of D in a step.
        steps: steps of B and of G.
        seed: of the initial weights and of all orders of rows.
        muon_lr, adam_lr, decay: as in train_demo_model.py.
    """

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    block: int = 256
    rows_a: int = 8
    rows_d: int = 2
    steps: int = 256
    seed: int = 0
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    decay: float = 0.4

    @property
    def b_tokens(self) -> int:
        """Tokens that B is trained on."""
        return self.steps * (self.rows_a + self.rows_d) * self.block

    def arguments(self, steps: int | None = None) -> argparse.Namespace:
        """The command line of train_demo_model.py for this shape, for a run of `steps` steps."""
        steps = steps or self.steps
        fixed = {"family": "qwen3", "vocab": 4096, "device": "cpu", "warm_up": min(WARM_UP, steps // 8)}
        return argparse.Namespace(**{**fixed, **vars(self), "steps": steps})


SHAPES = {"small": Shape(), "demo": Shape(hidden=256, intermediate=768, steps=512)}


def random_model(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The initial model of B and of G."""
    return make_model(shape.arguments(), tokenizer)


def rows_of_step(rows: torch.Tensor, batch: int, step: int, steps: int, seed: int) -> torch.Tensor:
    """The rows, `[batch, block]`, of a step out of `steps`: whole passes in random orders."""
    order = shuffled_order(len(rows), steps * batch, seed)
    return rows[order[step * batch : (step + 1) * batch]]


def next_token_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of `model` on token ids, `[rows, block]`, in nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def kl_loss(model: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) on token ids, `[rows, block]`, in nats per token."""
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    found = model(input_ids=ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def pretraining_loss(shape: Shape, a: torch.Tensor, d: torch.Tensor | None) -> LossOf:
    """The loss of a step of B on rows of A and D, `[rows, block]`, or of G without `d`."""

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        ids = rows_of_step(a, shape.rows_a, step, shape.steps, shape.seed)
        if d is not None:
            ids = torch.cat([ids, rows_of_step(d, shape.rows_d, step, shape.steps, shape.seed)])
        return next_token_loss(model, ids)

    return loss


def fit(
    model: PreTrainedModel,
    loss_of: LossOf,
    arguments: argparse.Namespace,
    file: Path,
    optimizers: list[torch.optim.Optimizer] | None = None,
    trunk: Path | None = None,
) -> PreTrainedModel:
    """Train `model` in place, or load it from `file`, where its state is saved on the way.

    Args:
        loss_of: the loss of a step.
        arguments: `steps`, and the rates and their course as train_demo_model.py has them.
        file: the state. It belongs to one training: to train otherwise, use another file.
        optimizers: at their peak rates; by default those of train_demo_model.py.
        trunk: shared by trainings that differ in their number of steps alone, with the same warm-up and the same order
            of rows. Until the rate of the shorter one begins to fall, both are the same. So the state at that step is
            saved here, and a longer training begins with it.
    """
    optimizers = optimizers or make_optimizers(model, arguments)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    falls = int(arguments.steps * (1 - arguments.decay))
    step = load(file, model, optimizers, arguments.steps)
    if step == 0 and trunk is not None:
        step = load(trunk, model, optimizers, falls)
    model.train()
    started, first = time.perf_counter(), step
    while step < arguments.steps:
        factor = learning_rate_factor(step, arguments)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        train_step(model, loss_of, optimizers, step, file.stem)
        step += 1
        if trunk is not None and step == falls:
            save(trunk, model, optimizers, step)
        if step % SAVE_EVERY == 0 or step == arguments.steps:
            seconds = (time.perf_counter() - started) / (step - first)
            print(f"{file.stem}: step {step}/{arguments.steps}, {seconds:.2f} s a step", flush=True)
            save(file, model, optimizers if step < arguments.steps else [], step)
    return model.eval()


def train_step(
    model: nn.Module, loss_of: LossOf, optimizers: list[torch.optim.Optimizer], step: int, name: str
) -> None:
    """One step, with clipped gradients."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model, step)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{name}: the loss of step {step} is {loss.item()}")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def load(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], most: int) -> int:
    """Read a saved state and return its step; 0, and nothing is read, without one or if its step is beyond `most`."""
    state = torch.load(file, weights_only=True) if file.is_file() else {"step": math.inf}
    if state["step"] > most:
        return 0
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):  # a finished one has none
        optimizer.load_state_dict(saved)
    return state["step"]


def save(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write the state of a training. The file is complete or as it was before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)
