"""Undoing a chain in closed form: from unlabelled activations, without gradients or a backward pass.

A chain is cut into K stages of consecutive blocks. Each stage becomes one block (K = 1: an ordinary MLP). For one
stage after the other:

1. Compute its input `t = x + gain * s`, where `s` is the stream of the stages solved so far.
2. First layer, one of: the chain's own rows side by side (*stacked*); a ridge regression of the
   true pre-activations on `t` (*linearised*); noise (*random*, a control that uses none of the chain's weights).
3. Second layer: a ridge regression of the residual (the true stream at the end of the stage minus `s`) on the units.

*Corrected*: both layers start from the chain's own weights, and the regressions fit the remaining errors. The ridge
then shrinks towards the lock and not towards 0, so a few hundred tokens are enough. With no tokens at all
(`side_by_side` alone) the dependence of blocks on each other is ignored.

Every ridge is chosen on held-out activations (lockkit/attack/ridge.py).
Source: this project's first measurements of the lock (ridge regression: Hoerl and Kennard 1970;
random features: Rahimi and Recht 2007).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from pydantic import BaseModel, Field

from lockkit.attack.base import CannotRun, UnlockAttack, Unlocked
from lockkit.attack.cost import Cost, Meter
from lockkit.attack.rebuild import chain_model, ordinary_model, stage_bounds
from lockkit.attack.ridge import RIDGES, Ridge
from lockkit.dlr.mlp import MLPWeights
from lockkit.dlr.net import DLRNet
from lockkit.dlr.view import side_by_side, walk
from lockkit.models.activation_cache import ActivationCache
from lockkit.models.capture import LayerwiseCapture
from lockkit.models.families import decoder_layers
from lockkit.models.layered import LayeredModel
from lockkit.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lockkit.attack.config import AuditConfig
    from lockkit.attack.subjects import Subjects

RIDGES_OF_CORRECTIONS = (*RIDGES, 1.0, 10.0, 100.0)  # with the largest, almost no correction is left
HELD_OUT_SHARE = 8  # one chunk of this many is held out
CHUNK = 2048  # tokens
CACHE_BYTES = 4 * 10**9  # of activations in memory; the rest is written to files
FirstLayer = Literal["stacked", "linearised", "random", "corrected"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """One solved stage: its weights, the ridge of its second layer, and that regression's held-out error."""

    weights: MLPWeights
    ridge: float
    error: float  # see `Ridge.solve`


def _chunks(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield chunks of `x`, `[tokens, hidden]`, and whether each is held out."""
    for index, part in enumerate(x.split(max(1, min(CHUNK, len(x) // HELD_OUT_SHARE)))):
        yield part, index % HELD_OUT_SHARE == HELD_OUT_SHARE - 1


def _trace(chain: DLRNet, x: torch.Tensor, first: int, last: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The true pre-activations of blocks `[first, last)`, gate and up (or up alone), and the stream after them."""
    before: list[list[torch.Tensor]] = []
    for index, step in enumerate(itertools.islice(walk(chain, x), last)):
        if index >= first:
            before.append(step.before)
    return [torch.cat(parts, 1) for parts in zip(*before, strict=True)], step.stream


def _stream_of(stages: list[Stage], x: torch.Tensor, chain: DLRNet) -> torch.Tensor:
    """The stream after the solved stages, `[tokens, hidden]`."""
    stream = torch.zeros_like(x)
    for stage in stages:
        units = stage.weights.units(chain.block_input(x, stream), chain.activation)
        stream = stream + units @ stage.weights.down.T
    return stream


def _random(like: MLPWeights, x: torch.Tensor, seed: int) -> MLPWeights:
    """Noise in place of the first layer, scaled so that pre-activations on `x` have about unit variance; zero biases."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 / x[:CHUNK].float().norm(dim=-1).mean().item()

    def noise(matrix: torch.Tensor) -> torch.Tensor:
        return (torch.randn(matrix.shape, generator=generator) * scale).to(matrix.device)

    def zeros(bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else torch.zeros_like(bias)

    up = noise(like.up)
    gate = None if like.gate is None else noise(like.gate)
    return MLPWeights(up, like.down, gate, zeros(like.up_bias), zeros(like.gate_bias))


@torch.no_grad()
def collapse(
    chain: DLRNet, x: torch.Tensor, bounds: list[tuple[int, int]], first_layer: FirstLayer, seed: int = 0
) -> list[Stage]:
    """Solve a chain for fewer blocks, see the top of this file.

    Args:
        x: inputs of the chain, `[tokens, hidden]`.
        bounds: blocks `[first, last)` of each stage, see `rebuild.stage_bounds`.
        first_layer: source of the first layer of each stage.
        seed: seed of the noise, if `first_layer` is `random`.

    Returns:
        The stages in order. The last one carries the output bias, if the chain has one.
    """
    device = next(chain.parameters()).device
    stages: list[Stage] = []
    for number, (first, last) in enumerate(bounds):
        weights, corrected = side_by_side(chain, first, last), first_layer == "corrected"
        if first_layer in ("linearised", "corrected"):
            _linearise(weights, chain, x, stages, first, last, corrected)
        elif first_layer == "random":
            weights = _random(weights, x, seed * len(bounds) + number)
        bias = chain.output_bias if number == len(bounds) - 1 else None
        second = Ridge(bias is not None, RIDGES_OF_CORRECTIONS if corrected else RIDGES)
        for part, held_out in _chunks(x):
            part = part.to(device)
            stream = _stream_of(stages, part, chain)
            units = weights.units(chain.block_input(part, stream), chain.activation)
            target = _trace(chain, part, first, last)[1] - stream
            if corrected:
                target = target - units @ weights.down.T
            elif bias is not None:
                target = target + bias
            second.add(units, target, held_out)
        down, down_bias, ridge, error = second.solve()
        weights.down = weights.down + down if corrected else down
        weights.down_bias = bias + down_bias if corrected and bias is not None and down_bias is not None else down_bias
        stages.append(Stage(weights, ridge, error))
    return stages


def _linearise(
    weights: MLPWeights, chain: DLRNet, x: torch.Tensor, stages: list[Stage], first: int, last: int, corrected: bool
) -> None:
    """Replace the first layer in `weights` by the regression of the pre-activations of blocks `[first, last)`.

    If `corrected`, the regression of the remaining error is added to the first layer instead.
    """
    device, bias = next(chain.parameters()).device, weights.up_bias is not None
    rows = Ridge(bias, RIDGES_OF_CORRECTIONS if corrected else RIDGES)
    names = ["up"] if weights.gate is None else ["gate", "up"]
    own = [(getattr(weights, name), getattr(weights, f"{name}_bias")) for name in names]
    for part, held_out in _chunks(x):
        part = part.to(device)
        t = chain.block_input(part, _stream_of(stages, part, chain))
        target = torch.cat(_trace(chain, part, first, last)[0], 1)
        if corrected:
            target = target - torch.cat(weights.pre_activations(t), 1)
        rows.add(t, target, held_out)
    both, intercept, _, _ = rows.solve()
    width = len(weights.up)
    for index, (name, (row, offset)) in enumerate(zip(names, own, strict=True)):
        part_rows = slice(index * width, (index + 1) * width)
        setattr(weights, name, row + both[part_rows] if corrected else both[part_rows])
        if intercept is not None:
            fitted = intercept[part_rows]
            setattr(weights, f"{name}_bias", offset + fitted if corrected else fitted)


class CollapseConfig(BaseModel):
    """Settings of a collapse into stages."""

    stages: int = Field(1, ge=1, description="Blocks of the unlocked model's chains; 1 is an ordinary MLP.")
    first_layer: FirstLayer = Field("linearised", description="Source of the first layer, see the module's docstring.")


def unlabelled_rows(subjects: Subjects) -> torch.Tensor:
    """The audit's unlabelled tokens for closed-form unlocks, `[rows, block]`; enough rows to hold some out."""
    return subjects.unlabelled[: max(HELD_OUT_SHARE // 4, -(-subjects.config.unlock_tokens // subjects.text_block))]


def mlp_inputs(locked: PreTrainedModel, rows: torch.Tensor, subjects: Subjects) -> Iterator[torch.Tensor]:
    """Yield the inputs of each decoder layer's MLP, `[tokens, hidden]`, in one forward pass over `rows`, `[rows, block]`."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache(Path(folder), CACHE_BYTES)
        capture = LayerwiseCapture(LayeredModel(locked, subjects.device), rows, cache, "unlock", Workers())
        inputs = cache.allocate("inputs", tuple(capture.hidden.shape))
        for index, layer in enumerate(decoder_layers(locked)):
            capture.advance(index, layer, inputs)
            yield inputs.flatten(0, 1)


def of_each_chain(
    locked: PreTrainedModel, rows: torch.Tensor, subjects: Subjects, function: Callable[[DLRNet, torch.Tensor], Result]
) -> tuple[list[Result], Cost]:
    """Apply `function` to the chain of each decoder layer.

    Args:
        rows: token ids, `[rows, block]`.
        function: called with a chain and its inputs on these tokens, `[tokens, hidden]`.

    Returns:
        The results, by decoder layer, and the cost.
    """
    chains: list[DLRNet] = [layer.mlp for layer in decoder_layers(locked)]
    with Meter(subjects.device) as meter, torch.no_grad():
        found = [function(chain, x) for chain, x in zip(chains, mlp_inputs(locked, rows, subjects), strict=True)]
    meter.cost.tokens = rows.numel()
    return found, meter.cost


class _Collapse(UnlockAttack):
    """Unlocks by `collapse`; they differ in their settings."""

    Config = CollapseConfig
    config: CollapseConfig
    reference = "this project; ridge regression: Hoerl and Kennard 1970"

    def unlock(self, locked: PreTrainedModel, subjects: Subjects) -> Unlocked:
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
            locked, unlabelled_rows(subjects), subjects, lambda chain, x: collapse(chain, x, bounds, config.first_layer)
        )
        notes = {
            "ridges": [[stage.ridge for stage in stages] for stages in solved],
            "held_out_error": [stages[-1].error for stages in solved],
        }
        layers = [[stage.weights for stage in stages] for stages in solved]
        if config.stages == 1:
            model = ordinary_model(locked, subjects.family, [stages[0] for stages in layers])
        else:
            model = chain_model(locked, subjects.family, config.stages, layers)
        return Unlocked(model, config.stages, cost, notes)


class StackSolve(_Collapse):
    """First layer: the blocks' own rows. Second layer: ridge regression."""

    name = "stack-solve"
    description = (
        "Put the blocks' first layers side by side in one MLP, and solve for its second layer by ridge regression."
    )

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="stacked")]


class LinearisedStack(_Collapse):
    """First layer: regression of all pre-activations on the chain's input. Second layer: ridge regression."""

    name = "linearised-stack"
    description = "Regress all pre-activations on the chain's input, then solve for the second layer."

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """One collapse into an ordinary MLP."""
        return [CollapseConfig(stages=1, first_layer="linearised")]


class PartialCollapse(_Collapse):
    """A shorter chain, solved one stage after the other."""

    name = "partial-collapse"
    description = "As linearised-stack, for each of K stages; the result is a chain of K blocks, not an ordinary MLP."

    @classmethod
    def trials(cls, audit: AuditConfig) -> list[CollapseConfig]:
        """Several numbers of stages."""
        return [CollapseConfig(stages=k, first_layer="linearised") for k in (2, 4, 8)]


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

    def unlock(self, locked: PreTrainedModel, subjects: Subjects) -> Unlocked:
        """Put the blocks of each chain side by side. With tokens, correct both layers by regressions on them."""
        if not self.config.tokens:
            weights = [side_by_side(layer.mlp) for layer in decoder_layers(locked)]
            return Unlocked(ordinary_model(locked, subjects.family, weights), 1, Cost())
        rows = subjects.unlabelled[: -(-self.config.tokens // subjects.text_block)]
        solved, cost = of_each_chain(
            locked, rows, subjects, lambda chain, x: collapse(chain, x, [(0, len(chain.blocks))], "corrected")[0]
        )
        notes = {
            "ridges": [stage.ridge for stage in solved],
            "left_of_what_to_correct": [stage.error for stage in solved],
        }
        return Unlocked(ordinary_model(locked, subjects.family, [stage.weights for stage in solved]), 1, cost, notes)


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
