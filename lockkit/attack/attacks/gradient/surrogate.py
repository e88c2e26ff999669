"""Forward pass through the lock, backward pass through an approximation of each chain (BPDA).

1. An unlock turns every chain into an ordinary MLP with as many hidden units, so that unit j of the MLP corresponds to
   unit j of the chain. The unlock is `stack-solve`, or a short `redistill` from the closed-form solution.
2. The surrogate of a chain has the chain's own weights side by side, plus a fixed correction that makes it equal to
   that MLP at the start. So it changes with the chain during training, and its gradients are used for the chain's weights.
3. The forward pass runs the chain and keeps only its input. The backward pass differentiates the surrogate.

On the original, an ordinary MLP is its own surrogate.

Source: backward pass differentiable approximation, Athalye et al. 2018, arXiv 1802.00420, section 4.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.autograd.function import once_differentiable

from lockkit.attack.attacks.unlocks.closed_form import CollapseConfig, StackSolve
from lockkit.attack.attacks.unlocks.redistill import Redistill, RedistillConfig
from lockkit.attack.base import CannotRun, GradientAttack, Unlocked
from lockkit.attack.finetune import FinetuneConfig, Training
from lockkit.attack.losses import logits_of, task_loss
from lockkit.attack.optimisers import make_optimiser
from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import side_by_side
from lockkit.models.families import Family, decoder_layers, mlp_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.subjects import Subjects

SAVERS = ("none", "checkpoint-layers", "offload", "compress")  # the others replace the chains' passes, too
PROBE_ROWS = 2  # for the fidelity of gradients
REDISTILL_SHARE = 4  # a short re-distillation has the audit's tokens divided by this


class SurrogateConfig(FinetuneConfig):
    """Settings of `surrogate-backward`."""

    surrogate: Literal["stack-solve", "redistill"] = Field(
        "stack-solve", description="The unlock that the surrogates come from."
    )


class SurrogateBackward(GradientAttack):
    """Backward pass differentiable approximation (BPDA) of the chains of a lock."""

    name = "surrogate-backward"
    description = "Forward pass through the lock, backward pass through an ordinary MLP that approximates each chain."
    reference = "Athalye et al. 2018, arXiv 1802.00420 (BPDA)"
    family = "optimisation"
    lock_aware = True
    needs_chains = True
    Config = SurrogateConfig
    config: SurrogateConfig

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Surrogates from both unlocks."""
        return [{"surrogate": "stack-solve"}, {"surrogate": "redistill"}]

    def prepare(self, model: PreTrainedModel, subjects: Subjects) -> Training:
        """Replace the backward pass of each chain of `model` by that of a surrogate. All weights are trained.

        Raises:
            CannotRun: the saver replaces the chains' passes, too.
        """
        config = self.config
        if config.saver not in SAVERS:
            raise CannotRun(
                f"the saver {config.saver} replaces the passes that this attack replaces: use one of {', '.join(SAVERS)}"
            )
        mlps = [layer.mlp for layer in decoder_layers(model)]
        named = list(model.named_parameters())
        training = Training(
            model,
            [p for _, p in named],
            make_optimiser("adamw", named, config.learning_rate),
        )
        surrogates = [Surrogate(mlp, subjects.family) for mlp in mlps]
        if isinstance(mlps[0], DLRNet):
            unlocked = _unlocked(config, model, subjects)
            for surrogate, layer in zip(surrogates, decoder_layers(unlocked.model), strict=True):
                surrogate.correct(mlp_weights(layer.mlp, subjects.family))
            training.before = unlocked.cost
            training.state = lambda: [value for s in surrogates for value in s.corrections.values()]
            training.notes = _fidelity(model, surrogates, subjects.unlabelled[:PROBE_ROWS].to(subjects.device))
        for surrogate in surrogates:
            surrogate.install()
        return training


def _unlocked(config: SurrogateConfig, model: PreTrainedModel, subjects: Subjects) -> Unlocked:
    if config.surrogate == "stack-solve":
        return StackSolve(CollapseConfig(first_layer="stacked")).unlock(model, subjects)
    tokens = max(1, subjects.config.redistill_tokens // REDISTILL_SHARE)
    short = RedistillConfig(start="warm", learning_rate=3e-4, tokens=tokens, points=1, seed=config.seed)
    return Redistill(short).unlock(model, subjects)


class Surrogate:
    """An ordinary MLP that replaces a chain in the backward pass.

    Args:
        mlp: the chain, or the original's MLP.
        family: the family of the model.

    Attributes:
        corrections: differences to the chain's own weights, by the names in `MLPWeights`.
    """

    def __init__(self, mlp: nn.Module, family: Family):
        self.mlp, self.family = mlp, family
        self.chain_forward = mlp.forward
        self.corrections: dict[str, torch.Tensor] = {}

    def _own(self) -> MLPWeights:
        if not isinstance(self.mlp, DLRNet):
            return mlp_weights(self.mlp, self.family)
        return side_by_side(self.mlp)

    @torch.no_grad()
    def correct(self, solved: MLPWeights) -> None:
        """Set the corrections so that the surrogate equals `solved` with the chain's current weights."""
        own = vars(self._own())
        self.corrections = {
            name: value.detach() - own[name] for name, value in vars(solved).items() if own[name] is not None
        }

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The surrogate's output, `[..., hidden]`, for `x`, `[..., hidden]`; without corrections, the chain's own."""
        if not self.corrections:
            return self.chain_forward(x)
        own = {name: value for name, value in vars(self._own()).items() if value is not None}
        weights = MLPWeights(**{name: value + self.corrections[name] for name, value in own.items()})
        assert isinstance(self.mlp, DLRNet), "only chains are corrected"
        return weights.output(x, self.mlp.activation)

    def install(self) -> None:
        """Replace the module's backward pass by the surrogate's."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return self.chain_forward(x)
            return _BackwardThrough.apply(self, x, *self.mlp.parameters())

        self.mlp.forward = forward


class _BackwardThrough(torch.autograd.Function):
    """The output of the chain, with the gradients of the surrogate."""

    @staticmethod
    def forward(ctx: Any, surrogate: Surrogate, x: torch.Tensor, *_weights: torch.Tensor) -> torch.Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(x)
        return surrogate.chain_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weights = list(ctx.surrogate.mlp.parameters())
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.surrogate(x.view_as(x))
            found = torch.autograd.grad(y, [x, *weights], gradient, allow_unused=True)
        return None, *found


def _fidelity(model: PreTrainedModel, surrogates: list[Surrogate], ids: torch.Tensor) -> dict[str, float]:
    """How close the surrogates' gradients are to the chains'. The attack does not need it, so its cost is not counted.

    Args:
        ids: token ids, `[rows, block]`.

    Returns:
        `jacobian_nmse`: error of the products of the Jacobian with random output directions, mean over layers.
        `jacobian_nmse_worst_layer`: the largest of these. `gradient_cosine`: between the gradients of all weights, for
        the language-modelling loss.
    """
    inputs: list[torch.Tensor] = []
    hooks = [s.mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach())) for s in surrogates]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        task_loss(logits_of(model, ids), ids).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient()
    for hook in hooks:
        hook.remove()
    errors = []
    for surrogate, x in zip(surrogates, inputs, strict=True):
        direction = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        wanted, given = (torch.autograd.grad(f(leaf), leaf, direction)[0] for f in (surrogate.chain_forward, surrogate))
        errors.append(((given - wanted).square().sum() / wanted.square().sum()).item())
    before = [surrogate.mlp.__dict__.get("forward") for surrogate in surrogates]
    for surrogate in surrogates:
        surrogate.install()
    approximate = gradient()
    model.zero_grad()
    for surrogate, forward in zip(surrogates, before, strict=True):
        del surrogate.mlp.forward
        if forward is not None:
            surrogate.mlp.forward = forward
    return {
        "jacobian_nmse": sum(errors) / len(errors),
        "jacobian_nmse_worst_layer": max(errors),
        "gradient_cosine": F.cosine_similarity(exact, approximate, dim=0).item(),
    }
