"""Unlocks in closed form: each chain becomes one MLP, or a chain of K blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import BaseModel, Field

from lockkit.attack.base import CannotRun, UnlockAttack, Unlocked
from lockkit.attack.closed_form import HELD_OUT_SHARE, FirstLayer, collapse
from lockkit.attack.cost import Cost, Meter
from lockkit.attack.rebuild import chain_model, ordinary_model, stage_bounds
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import side_by_side
from lockkit.models.activation_cache import ActivationCache
from lockkit.models.capture import LayerwiseCapture
from lockkit.models.families import decoder_layers
from lockkit.models.layered import LayeredModel
from lockkit.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.bench import Bench
    from lockkit.attack.config import AuditConfig

CACHE_BYTES = 4 * 10**9  # of activations in memory; the rest is written to files
Result = TypeVar("Result")


class CollapseConfig(BaseModel):
    """Settings of a collapse into stages."""

    stages: int = Field(1, ge=1, description="Blocks of the unlocked model's chains; 1 is an ordinary MLP.")
    first_layer: FirstLayer = Field(
        "linearised", description="Source of the first layer, see lockkit/attack/closed_form.py."
    )


def unlabelled_rows(bench: Bench) -> torch.Tensor:
    """The audit's unlabelled tokens for closed-form unlocks, `[rows, block]`; enough rows to hold some out."""
    return bench.unlabelled[: max(HELD_OUT_SHARE // 4, -(-bench.config.unlock_tokens // bench.text_block))]


def mlp_inputs(locked: PreTrainedModel, rows: torch.Tensor, bench: Bench) -> Iterator[torch.Tensor]:
    """Yield the inputs of each decoder layer's MLP, `[tokens, hidden]`, in one forward pass over `rows`, `[rows, block]`."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache(Path(folder), CACHE_BYTES)
        capture = LayerwiseCapture(LayeredModel(locked, bench.device), rows, cache, "unlock", Workers())
        inputs = cache.allocate("inputs", tuple(capture.hidden.shape))
        for index, layer in enumerate(decoder_layers(locked)):
            capture.advance(index, layer, inputs)
            yield inputs.flatten(0, 1)


def of_each_chain(
    locked: PreTrainedModel, rows: torch.Tensor, bench: Bench, function: Callable[[DLRNet, torch.Tensor], Result]
) -> tuple[list[Result], Cost]:
    """Apply `function` to the chain of each decoder layer.

    Args:
        rows: token ids, `[rows, block]`.
        function: called with a chain and its inputs on these tokens, `[tokens, hidden]`.

    Returns:
        The results, by decoder layer, and the cost.
    """
    chains: list[DLRNet] = [layer.mlp for layer in decoder_layers(locked)]
    with Meter(bench.device) as meter, torch.no_grad():
        found = [function(chain, x) for chain, x in zip(chains, mlp_inputs(locked, rows, bench), strict=True)]
    meter.cost.tokens = rows.numel()
    return found, meter.cost


class _Collapse(UnlockAttack):
    """Unlocks by `collapse`; they differ in their settings."""

    Config = CollapseConfig
    config: CollapseConfig
    reference = "this project; ridge regression: Hoerl and Kennard 1970"

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Solve the stages of each chain on the unlabelled tokens.

        Raises:
            CannotRun: the blocks cannot be divided into stages of equal rank.
        """
        config = self.config
        chain = decoder_layers(locked)[0].mlp
        bounds = stage_bounds(chain, config.stages)
        if bounds is None:
            raise CannotRun(f"{len(chain.blocks)} blocks cannot be divided into {config.stages} stages of equal rank")
        solved, cost = of_each_chain(
            locked, unlabelled_rows(bench), bench, lambda chain, x: collapse(chain, x, bounds, config.first_layer)
        )
        notes = {
            "ridges": [[stage.ridge for stage in stages] for stages in solved],
            "held_out_error": [stages[-1].error for stages in solved],
        }
        layers = [[stage.weights for stage in stages] for stages in solved]
        if config.stages == 1:
            model = ordinary_model(locked, bench.family, [stages[0] for stages in layers])
        else:
            model = chain_model(locked, bench.family, config.stages, layers)
        return Unlocked(model, config.stages, cost, notes)


class StackSolve(_Collapse):
    """First layer: the blocks' own rows. Second layer: ridge regression."""

    name = "stack-solve"
    description = (
        "Put the blocks' first layers side by side in one MLP, and solve for its second layer by ridge regression."
    )
    in_quick = True

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="stacked")]


class LinearisedStack(_Collapse):
    """First layer: regression of all pre-activations on the chain's input. Second layer: ridge regression."""

    name = "linearised-stack"
    description = "Regress all pre-activations on the chain's input, then solve for the second layer."
    in_quick = True

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="linearised")]


class PartialCollapse(_Collapse):
    """A shorter chain, solved one stage after the other."""

    name = "partial-collapse"
    description = "As linearised-stack, for each of K stages; the result is a chain of K blocks, not an ordinary MLP."
    in_quick = True

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """Several numbers of stages; only one in the suite `quick`."""
        stages = [2] if audit.suite == "quick" else [2, 4, 8]
        return [CollapseConfig(stages=k, first_layer="linearised") for k in stages]


class CorrectedConfig(BaseModel):
    """Settings of `corrected-stack`."""

    tokens: int = Field(
        1024,
        ge=0,
        description="Unlabelled tokens, rounded up to whole rows of text. With 0, the weights are not corrected.",
    )


class CorrectedStack(UnlockAttack):
    """First and second layer: the blocks' own weights, plus ridge corrections."""

    name = "corrected-stack"
    description = "The blocks side by side as one MLP: unchanged, or corrected by regressions that need few tokens."
    reference = "this project; ridge towards a prior: Swindel 1976, Good ridge estimators based on prior information"
    in_quick = True
    Config = CorrectedConfig
    config: CorrectedConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CorrectedConfig]:
        """Several numbers of tokens, including 0, up to the audit's."""
        tried = (0, 1024) if audit.suite == "quick" else (0, 256, 1024, 4096)
        return [CorrectedConfig(tokens=tokens) for tokens in tried if tokens <= audit.unlock_tokens]

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Put the blocks of each chain side by side. With tokens, correct both layers by regressions on them."""
        if not self.config.tokens:
            weights = [side_by_side(layer.mlp) for layer in decoder_layers(locked)]
            return Unlocked(ordinary_model(locked, bench.family, weights), 1, Cost())
        rows = bench.unlabelled[: -(-self.config.tokens // bench.text_block)]
        solved, cost = of_each_chain(
            locked, rows, bench, lambda chain, x: collapse(chain, x, [(0, len(chain.blocks))], "corrected")[0]
        )
        notes = {
            "ridges": [stage.ridge for stage in solved],
            "left_of_what_to_correct": [stage.error for stage in solved],
        }
        return Unlocked(ordinary_model(locked, bench.family, [stage.weights for stage in solved]), 1, cost, notes)


class RandomFeatures(_Collapse):
    """First layer: noise. Second layer: ridge regression. It shows what the lock's weights add to other unlocks."""

    name = "random-features"
    description = "A random first layer, and a second layer by ridge regression: it uses none of the lock's weights."
    reference = "Rahimi and Recht 2007, Random features for large-scale kernel machines"
    lock_aware = False
    control_share = 0.5

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="random")]
