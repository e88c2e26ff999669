"""Optimisers by name, for the attacks that try several. None of them uses weight decay.

An optimiser that is for matrices only (Muon) updates the matrices of the hidden layers. AdamW then updates embeddings,
head, norms and biases.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lockkit.attack.base import CannotRun

BETAS = (0.9, 0.95)
Named = list[tuple[str, nn.Parameter]]
# Other packages import bitsandbytes if it is installed. It then warns about kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Together(torch.optim.Optimizer):
    """Several optimisers that step as one. Each parameter group keeps its own learning rate.

    Args:
        optimisers: the optimisers; those that are None are ignored.
    """

    def __init__(self, *optimisers: torch.optim.Optimizer | None):
        self.optimisers = [o for o in optimisers if o is not None]

    # PyTorch declares `param_groups` and `state` as attributes; here they are computed from the parts.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of all optimisers."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        """The state of all optimisers, by parameter."""
        return {key: value for optimiser in self.optimisers for key, value in optimiser.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each optimiser. `closure` is not supported."""
        for optimiser in self.optimisers:
            optimiser.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none)


def _adamw(named: Named, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in named], lr=rate, betas=BETAS, weight_decay=0.0)


def _sgd(named: Named, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=rate, weight_decay=0.0)


def _nesterov(named: Named, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=rate, momentum=0.9, nesterov=True, weight_decay=0.0)


def _adafactor(named: Named, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor([p for _, p in named], lr=rate, weight_decay=0.0)


def _muon(named: Named, rate: float) -> torch.optim.Optimizer:
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    others = [(name, p) for name, p in named if id(p) not in chosen]
    first = (
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        if matrices
        else None
    )
    return Together(first, _adamw(others, rate) if others else None)


def _soap(named: Named, rate: float) -> torch.optim.Optimizer:
    soap = optional_package("pytorch_optimizer").SOAP
    # Longer sides, such as a vocabulary, get no preconditioner. The paper's limit is 10,000.
    return soap([p for _, p in named], lr=rate, weight_decay=0.0, max_precondition_dim=2048)


def _schedule_free(named: Named, rate: float) -> torch.optim.Optimizer:
    optimiser = optional_package("schedulefree").AdamWScheduleFree(
        [p for _, p in named], lr=rate, betas=BETAS, weight_decay=0.0
    )
    optimiser.train()
    return optimiser


@dataclass(frozen=True)
class Choice:
    """An optimiser, and the factor between AdamW's learning rates and its own."""

    make: Callable[[Named, float], torch.optim.Optimizer]  # named parameters, learning rate
    rate_factor: float = 1.0


OPTIMISERS = {
    "adamw": Choice(_adamw),
    "sgd": Choice(_sgd, 100.0),
    "nesterov": Choice(_nesterov, 30.0),
    "adafactor": Choice(_adafactor, 3.0),
    "muon": Choice(_muon),
    "soap": Choice(_soap),
    "schedule-free": Choice(_schedule_free),
}


def optional_package(module: str) -> ModuleType:
    """Import a package of the extra `attack`.

    Raises:
        CannotRun: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.replace("_", "-")
        raise CannotRun(f"the package {name} is not installed: pip install 'lockkit[attack]'") from error


def make_optimiser(name: str, named: Iterable[tuple[str, nn.Parameter]], rate: float) -> torch.optim.Optimizer:
    """Build an optimiser for the trainable parameters among `named`. Tied parameters are included once.

    Args:
        name: a key of `OPTIMISERS`.
        named: names and parameters.
        rate: peak learning rate.

    Raises:
        CannotRun: its package is not installed.
    """
    seen: set[int] = set()
    unique = []
    for key, parameter in named:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            unique.append((key, parameter))
    return OPTIMISERS[name].make(unique, rate)
