"""What a verification measures, and beside it the gates that hold these figures against limits.

A figure is a field of one of the records; its name is its name in `lockkit verify --json`. A gate is one
entry of `Gates`: its limit, which way it holds, what it is for, and which figures it holds. The options of
`lockkit verify`, the verdict, the table and the line that names a failure follow from it. Its default
limits are with the precisions (lockkit/targets.py). Imports no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockkit.measure.records import Fidelity, Figure, Record
from lockkit.targets import Precision

Mode = Literal["prefill", "cache_tokens", "cache_chunk", "padded_batch"]


# --- figures -------------------------------------------------------------------------------------


class Parity(Record):
    """How far the ONNX graph's logits are from PyTorch's, in one way of running it.

    A field's title heads its column in the terminal.
    """

    mode: Mode = Field(
        title="",
        description="prefill: whole rows, no cache. cache_tokens: a prefix, then token by token. "
        "cache_chunk: a prefix, then the rest but one at once, then the last token. "
        "padded_batch: rows of unequal lengths in one batch and one more token each, real positions only.",
    )
    tokens: int = Field(title="tokens", description="Positions compared.")
    max_difference: Figure = Field(title="max |diff|", description="Largest absolute difference of two logits.")
    mean_difference: Figure = Field(title="mean |diff|", description="Mean absolute difference of logits.")
    kl_divergence: Figure = Field(
        title="KL", description="Mean KL(PyTorch || ONNX) per token, nats, computed in float64."
    )
    top1_agreement: Figure = Field(title="top-1", description="Share of positions with the same highest logit, 0 to 1.")


class Parting(Record):
    """Where one greedy continuation of ONNX parts from PyTorch's."""

    prompt: int = Field(description="Number of the prompt, from 0.")
    position: int = Field(description="Number of the first generated token that differs, from 0.")
    gap: Figure = Field(description="PyTorch's logit of its own token there, minus that of the token ONNX chose.")
    tied: bool = Field(description="The gap is within the configuration's tie_tolerance.")


class Continuations(Record):
    """Greedy continuations of the same prompts, with the cache, by PyTorch and by ONNX."""

    prompts: int = Field(description="Continuations compared.")
    prompt_tokens: int = Field(description="Tokens in each prompt.")
    new_tokens: int = Field(description="Tokens generated for each; an end-of-text token does not end them.")
    identical: Figure = Field(description="Share of continuations that are identical, 0 to 1.")
    identical_or_tied: Figure = Field(description="Share identical, or parting at a tie, 0 to 1.")
    partings: list[Parting] = Field(description="One for each continuation that is not identical.")


class PerplexityFigures(Record):
    """Perplexity on the same held-out tokens, and its ratios; null where a model was not given."""

    predictions: int = Field(description="Next-token predictions counted: all but the first of every row.")
    original: Figure | None = Field(description="Of the original PyTorch model.")
    locked: Figure | None = Field(description="Of the locked PyTorch model.")
    onnx: Figure = Field(description="Of the ONNX graph.")
    locked_over_original: Figure | None = Field(description="Ratio of perplexities.")
    onnx_over_original: Figure | None = Field(description="Ratio of perplexities.")
    onnx_over_locked: Figure | None = Field(description="Ratio of perplexities.")

    @classmethod
    def of(cls, predictions: int, onnx: float, original: float | None, locked: float | None) -> PerplexityFigures:
        """With the ratios of those that are there."""

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
    """All figures of a verification; the names are `VerifyResult`'s."""

    parity: list[Parity]
    continuations: Continuations | None
    perplexity: PerplexityFigures
    fidelity: Fidelity | None

    def of_all_modes(self, figure: str) -> dict[str, float]:
        """One figure of `parity`, by mode."""
        return {parity.mode: getattr(parity, figure) for parity in self.parity}

    def perplexity_ratio(self) -> dict[str, float | None]:
        """ONNX over the original; over the locked model where the original was not given."""
        name = "onnx_over_original" if self.perplexity.onnx_over_original is not None else "onnx_over_locked"
        return {name: getattr(self.perplexity, name)}

    def same_continuations(self) -> dict[str, float]:
        """The share of greedy continuations that are the same, if there are any."""
        return {} if self.continuations is None else {"identical_or_tied": self.continuations.identical_or_tied}


# --- gates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """What a gate does: which figures it holds, by name, and in which direction."""

    name: str
    at_most: bool
    figures: Callable[[Measured], dict[str, Any]]

    @property
    def sign(self) -> str:
        """Of a figure that is kept, before the limit."""
        return "≤" if self.at_most else "≥"

    def kept(self, value: float, limit: float) -> bool:
        """Whether a figure is within the limit; one that is not finite never is."""
        return math.isfinite(value) and (value <= limit if self.at_most else value >= limit)


GATES: dict[str, Gate] = {}


def _gate(name: str, at_most: bool, description: str, figures: Callable[[Measured], dict[str, Any]]) -> Any:
    """The field of a gate in `Gates`."""
    GATES[name] = Gate(name, at_most, figures)
    limits = [(precision.row.gates.get(name), precision) for precision in Precision]
    shown = ", ".join(f"{'off' if limit is None else f'{limit:g}'} {precision}" for limit, precision in limits)
    return Field(None, ge=0, description=f"{description} By default, by precision: {shown}.")


class Gates(BaseModel):
    """Limits that an export must keep."""

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
        description="Lowest share of positions with the same top token, in every mode.",
        figures=lambda measured: measured.of_all_modes("top1_agreement"),
    )
    max_perplexity_ratio: float | None = _gate(
        "max_perplexity_ratio",
        at_most=True,
        description="Highest perplexity of ONNX over the original's.",
        figures=Measured.perplexity_ratio,
    )
    min_continuations: float | None = _gate(
        "min_continuations",
        at_most=False,
        description="Lowest share of greedy continuations that are identical, or part where the top tokens are tied.",
        figures=Measured.same_continuations,
    )

    def limits(self, precision: Precision) -> dict[str, float | None]:
        """The limit of every gate for an export of `precision`: the one set here, else its default. None is off."""
        own = {name: getattr(self, name) for name in GATES}
        return {name: precision.row.gates.get(name) if limit is None else limit for name, limit in own.items()}


class GateOutcome(Record):
    """One limit, and whether it was kept."""

    gate: str = Field(description="Name of the gate in the configuration.")
    figure: str = Field(description="What was measured: a mode, or what the ratio is over.")
    value: Figure = Field(description="The figure; null if it is not finite.")
    limit: Figure = Field(description="The limit; null if it is infinite.")
    passed: bool = Field(description="A figure that is not finite never passes.")


def judge(limits: dict[str, float | None], measured: Measured) -> list[GateOutcome]:
    """Hold the figures against the limits, `Gates.limits`; a figure that is not finite never passes."""
    return [
        GateOutcome(gate=gate.name, figure=figure, value=value, limit=limit, passed=gate.kept(value, limit))
        for gate in GATES.values()
        if (limit := limits[gate.name]) is not None
        for figure, value in gate.figures(measured).items()
    ]
