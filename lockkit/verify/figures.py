"""The figures of a verification, and the gates that compare them with limits. Imports no PyTorch.

A figure is a field of one of the records. Its name in `lockkit verify --json` is the field's.

A gate is one field of `Gates`. It says which figures it limits, whether the limit is an upper or a lower one, and what
it is for. The options of `lockkit verify`, the verdict, the table and the message of a failure follow from that. The
default limits are in lockkit/targets.py, beside the precisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.measure.records import Fidelity, Figure, Record
from lockkit.targets import Precision

Mode = Literal["prefill", "cache_tokens", "cache_chunk", "padded_batch", "last_position"]


# --- figures -------------------------------------------------------------------------------------


class Parity(Record):
    """How far the logits of ONNX are from those of PyTorch, in one way of running the graph.

    The title of a field is the head of its column in the terminal.
    """

    mode: Mode = Field(
        title="",
        description="prefill: whole rows, without a cache. cache_tokens: a prefix, then token by token. "
        "cache_chunk: a prefix, then all tokens but the last in one call, then the last. "
        "padded_batch: rows of unequal lengths in one batch, then one more token each; padding is not compared. "
        "last_position: the same with the graph that generates text; only the last token of each call is compared.",
    )
    tokens: int = Field(title="tokens", description="Positions compared.")
    max_difference: Figure = Field(title="max |diff|", description="Largest absolute difference of two logits.")
    mean_difference: Figure = Field(title="mean |diff|", description="Mean absolute difference of logits.")
    kl_divergence: Figure = Field(
        title="KL", description="Mean KL(PyTorch || ONNX) per token, nats, computed in float64."
    )
    top1_agreement: Figure = Field(title="top-1", description="Share of positions with the same highest logit, 0 to 1.")


class Parting(Record):
    """The first token at which a greedy continuation of ONNX differs from PyTorch's."""

    prompt: int = Field(description="Number of the prompt, from 0.")
    position: int = Field(description="Number of the first generated token that differs, from 0.")
    gap: Figure = Field(description="PyTorch's logit of its own token there, minus its logit of the token of ONNX.")
    tied: bool = Field(description="The gap is no larger than tie_tolerance.")


class Continuations(Record):
    """Greedy continuations of the same prompts by PyTorch and by ONNX, with a cache."""

    prompts: int = Field(description="Continuations compared.")
    prompt_tokens: int = Field(description="Tokens in each prompt.")
    new_tokens: int = Field(description="Tokens generated per prompt. An end-of-text token does not stop generation.")
    identical: Figure = Field(description="Share of continuations that are identical, 0 to 1.")
    identical_or_tied: Figure = Field(description="Share that are identical or first differ at a tie, 0 to 1.")
    partings: list[Parting] = Field(description="One for each continuation that is not identical.")


class PerplexityFigures(Record):
    """Perplexities on the same held-out tokens and their ratios. null if a model was not given."""

    predictions: int = Field(description="Predicted tokens: all but the first of every row.")
    original: Figure | None = Field(description="Of the original PyTorch model.")
    locked: Figure | None = Field(description="Of the locked PyTorch model.")
    onnx: Figure = Field(description="Of the ONNX graph.")
    locked_over_original: Figure | None = Field(description="Ratio of perplexities.")
    onnx_over_original: Figure | None = Field(description="Ratio of perplexities.")
    onnx_over_locked: Figure | None = Field(description="Ratio of perplexities.")

    @classmethod
    def of(cls, predictions: int, onnx: float, original: float | None, locked: float | None) -> PerplexityFigures:
        """The perplexities, with the ratios of those that are not None."""

        def ratio(above: float | None, below: float | None) -> float | None:
            return None if above is None or below is None else above / below

        return cls(
            predictions=predictions,
            original=original,
            locked=locked,
            onnx=onnx,
            locked_over_original=ratio(locked, original),
            onnx_over_original=ratio(onnx, original),
            onnx_over_locked=ratio(onnx, locked),
        )


@dataclass
class Measured:
    """All figures of a verification, by their names in `VerifyResult`."""

    parity: list[Parity]
    continuations: Continuations | None
    perplexity: PerplexityFigures
    fidelity: Fidelity | None

    def of_all_modes(self, figure: str) -> dict[str, float]:
        """One figure of `Parity` in every mode, by mode."""
        return {parity.mode: getattr(parity, figure) for parity in self.parity}

    def perplexity_ratio(self) -> dict[str, float | None]:
        """Perplexity of ONNX over the original's, or over the locked model's if the original was not given."""
        name = "onnx_over_original" if self.perplexity.onnx_over_original is not None else "onnx_over_locked"
        return {name: getattr(self.perplexity, name)}

    def same_continuations(self) -> dict[str, float]:
        """The share of greedy continuations that are identical or first differ at a tie. Empty if there are none."""
        return {} if self.continuations is None else {"identical_or_tied": self.continuations.identical_or_tied}

    def to_original(self, figure: str) -> dict[str, float]:
        """One figure of `Fidelity`. Empty unless the original and the locked model were given."""
        return {} if self.fidelity is None else {"locked_to_original": getattr(self.fidelity, figure)}


# --- gates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A gate.

    Attributes:
        name: of its limit in the configuration.
        at_most: whether the limit is an upper one.
        figures: returns the figures it limits, by name.
    """

    name: str
    at_most: bool
    figures: Callable[[Measured], dict[str, Any]]

    @property
    def sign(self) -> str:
        """The relation of a figure that passes to its limit."""
        return "≤" if self.at_most else "≥"

    def passes(self, value: float, limit: float) -> bool:
        """Whether a figure is within the limit. A figure that is not finite never passes."""
        return math.isfinite(value) and (value <= limit if self.at_most else value >= limit)


GATES: dict[str, Gate] = {}


def _gate(name: str, at_most: bool, description: str, figures: Callable[[Measured], dict[str, Any]]) -> Any:
    """Register a gate; return its field in `Gates`. All lower limits are shares, so a limit above 1 could not be met."""
    most = None if at_most else 1
    GATES[name] = Gate(name, at_most, figures)
    shown = [(_shown(precision.row.limit(name)), precision) for precision in Precision]
    if len({limit for limit, _ in shown}) == 1:
        return Field(None, ge=0, le=most, description=f"{description} By default {shown[0][0]}.")
    by_precision = ", ".join(f"{limit} {precision}" for limit, precision in shown)
    return Field(None, ge=0, le=most, description=f"{description} By default, by precision: {by_precision}.")


def _shown(limit: float | None) -> str:
    return "off" if limit is None else f"{limit:g}"


class Gates(BaseModel):
    """The limits of all gates. None is the default of the export's precision."""

    model_config = ConfigDict(extra="forbid")

    max_kl: float | None = _gate(
        "max_kl",
        at_most=True,
        description="Highest mean KL(PyTorch || ONNX) per token, in nats, in every mode.",
        figures=lambda measured: measured.of_all_modes("kl_divergence"),
    )
    min_top1: float | None = _gate(
        "min_top1",
        at_most=False,
        description="Lowest share of positions with the same most likely token, in every mode.",
        figures=lambda measured: measured.of_all_modes("top1_agreement"),
    )
    max_perplexity_ratio: float | None = _gate(
        "max_perplexity_ratio",
        at_most=True,
        description="Highest perplexity of ONNX divided by the original's.",
        figures=Measured.perplexity_ratio,
    )
    min_continuations: float | None = _gate(
        "min_continuations",
        at_most=False,
        description="Lowest share of greedy continuations that are identical, or first differ where the two highest "
        "logits are tied.",
        figures=Measured.same_continuations,
    )
    max_lock_kl: float | None = _gate(
        "max_lock_kl",
        at_most=True,
        description="Highest mean KL(original || locked) per token, in nats, both in PyTorch. Needs both references; "
        "`inf` turns it off.",
        figures=lambda measured: measured.to_original("kl_divergence"),
    )
    min_lock_top1: float | None = _gate(
        "min_lock_top1",
        at_most=False,
        description="Lowest share of predictions with the same most likely token in the original and the locked model. "
        "Needs both references; 0 turns it off.",
        figures=lambda measured: measured.to_original("top1_agreement"),
    )

    def limits(self, precision: Precision) -> dict[str, float | None]:
        """The limit of every gate for an export of `precision`: the one set here, or the default. None is off."""
        own = {name: getattr(self, name) for name in GATES}
        return {name: precision.row.limit(name) if limit is None else limit for name, limit in own.items()}


class GateOutcome(Record):
    """The outcome of one gate for one figure."""

    gate: str = Field(description="Name of the gate in the configuration.")
    figure: str = Field(
        description="Which figure: a mode, a perplexity ratio, the share of continuations, or the locked model compared with the "
        "original."
    )
    value: Figure = Field(description="The figure; null if it is not finite.")
    limit: Figure = Field(description="The limit; null if it is infinite.")
    passed: bool = Field(description="A figure that is not finite never passes.")


def judge(limits: dict[str, float | None], measured: Measured) -> list[GateOutcome]:
    """Compare the figures with the limits, as `Gates.limits` gives them. A figure that is not finite never passes."""
    return [
        GateOutcome(gate=gate.name, figure=figure, value=value, limit=limit, passed=gate.passes(value, limit))
        for gate in GATES.values()
        if (limit := limits[gate.name]) is not None
        for figure, value in gate.figures(measured).items()
    ]
