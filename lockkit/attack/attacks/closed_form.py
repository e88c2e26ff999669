"""Unlocks in closed form: the whole chain into one MLP, or into K stages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

CACHE_BYTES = 4 * 10**9  # activations kept in memory; the rest goes to files


class CollapseConfig(BaseModel):
    """Settings of a collapse into stages."""

    stages: int = Field(1, ge=1, description="Blocks that the result has; 1 is an ordinary MLP.")
    first_layer: FirstLayer = Field("linearised", description="Where the first layer comes from.")


def unlabelled_rows(bench: Bench) -> torch.Tensor:
    """Token ids `[rows, block]` of the audit's unlabelled tokens; enough rows to hold some out."""
    return bench.unlabelled[: max(HELD_OUT_SHARE // 4, -(-bench.config.unlock_tokens // bench.text_block))]


def mlp_inputs(locked: PreTrainedModel, rows: torch.Tensor, bench: Bench) -> Iterator[torch.Tensor]:
    """Yield the inputs of each layer's MLP on `rows`, `[tokens, hidden]`, in one forward pass over `[rows, block]`."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache(Path(folder), CACHE_BYTES)
        capture = LayerwiseCapture(LayeredModel(locked, bench.device), rows, cache, "unlock", Workers())
        inputs = cache.allocate("inputs", tuple(capture.hidden.shape))
        for index, layer in enumerate(decoder_layers(locked)):
            capture.advance(index, layer, inputs)
            yield inputs.flatten(0, 1)


def of_each_chain(
    locked: PreTrainedModel, rows: torch.Tensor, bench: Bench, function: Callable[[DLRNet, torch.Tensor], Any]
) -> tuple[list, Cost]:
    """Apply `function` to each chain and its inputs, `[tokens, hidden]`; return all results, and the cost.

    Args:
        rows: token ids, `[rows, block]`.
        function: from a chain and its inputs.
    """
    chains = [layer.mlp for layer in decoder_layers(locked)]
    with Meter(bench.device) as meter, torch.no_grad():
        found = [function(*both) for both in zip(chains, mlp_inputs(locked, rows, bench), strict=True)]
    meter.cost.tokens = rows.numel()
    return found, meter.cost


class _Collapse(UnlockAttack):
    Config = CollapseConfig
    reference = "this project; ridge regression: Hoerl and Kennard 1970"

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Solve each layer's stages on the unlabelled tokens.

        Raises:
            CannotRun: the blocks cannot be cut into stages of equal rank.
        """
        config = self.config
        chain = decoder_layers(locked)[0].mlp
        bounds = stage_bounds(chain, config.stages)
        if bounds is None:
            raise CannotRun(f"{len(chain.blocks)} blocks cannot be cut into {config.stages} stages of equal rank")
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
    description = "Put the blocks' first layers side by side in one MLP; solve the second layer by ridge regression."
    in_quick = True

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="stacked")]


class LinearisedStack(_Collapse):
    """First layer: regression of all pre-activations on the chain's input. Second layer: ridge regression."""

    name = "linearised-stack"
    description = "Regress all pre-activations on the chain's input, then solve the second layer."
    in_quick = True

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="linearised")]


class PartialCollapse(_Collapse):
    """A shorter chain, solved stage by stage."""

    name = "partial-collapse"
    description = "As linearised-stack, for each of K stages; the result is a chain of K blocks, not an ordinary MLP."
    in_quick = True

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """Several numbers of stages; one in the suite `quick`."""
        stages = [2] if audit.suite == "quick" else [2, 4, 8]
        return [CollapseConfig(stages=k, first_layer="linearised") for k in stages]


class CorrectedConfig(BaseModel):
    """Settings of `corrected-stack`."""

    tokens: int = Field(
        1024, ge=0, description="Unlabelled tokens, in whole rows of text; with 0 no weight is changed."
    )


class CorrectedStack(UnlockAttack):
    """First and second layer: the blocks' own weights, plus ridge corrections."""

    name = "corrected-stack"
    description = "The blocks side by side as one MLP: unchanged, or corrected by regressions that need few tokens."
    reference = "this project; ridge towards a prior: Swindel 1976, Good ridge estimators based on prior information"
    in_quick = True
    Config = CorrectedConfig

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CorrectedConfig]:
        """Several numbers of tokens, 0 included, up to the audit's."""
        tried = (0, 1024) if audit.suite == "quick" else (0, 256, 1024, 4096)
        return [CorrectedConfig(tokens=tokens) for tokens in tried if tokens <= audit.unlock_tokens]

    def unlock(self, locked: PreTrainedModel, bench: Bench) -> Unlocked:
        """Put each chain's blocks side by side; with tokens, correct both layers by regression on them."""
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
    """First layer: noise. Second layer: ridge regression. A control for what the lock's weights are worth."""

    name = "random-features"
    description = "A random first layer, the second solved by ridge regression: a closed form that uses none of the lock's weights."
    reference = "Rahimi and Recht 2007, Random features for large-scale kernel machines"
    lock_aware = False
    control_share = 0.5

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="random")]
