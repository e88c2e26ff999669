"""The verdict of an audit: one paragraph that follows from its figures by fixed rules (sentences.py)."""

from __future__ import annotations

import math
from typing import Any

from lockkit.attack.record import Amplification, TaskSummary, Verdict
from lockkit.attack.sentences import NOT_MEASURED, RULES, level_of, span, times
from lockkit.attack.target import RESOURCES

PRICE = "flops"  # the resource that the level follows from
SHOWN = ("tokens", "flops", "peak_tensor_bytes", "saved_bytes")  # in the range of the sentence; seconds vary too much
DAMAGED = 1.05  # perplexity over the original's, above which a lock is said to be worse
_WORTH = {
    "none": "gives no protection against someone who knows the method",
    "little": "gives little protection against someone who knows the method",
    "some": "gives some protection against the attacks that were tried",
    "strong": "withstood the attacks that were tried",
}


def verdict_of(
    tasks: dict[str, TaskSummary],
    unlocks: dict[str, dict[str, Any]],
    near: set[str],
    missing: list[str],
    perplexity_ratio: float,
    has_chains: bool,
) -> Verdict:
    """The verdict.

    Args:
        unlocks: the unlocked models, by label.
        near: labels of those that are close to the lock.
        missing: what has to run before the audit can say anything.
        perplexity_ratio: of the lock, over the original's.
        has_chains: whether the lock is one of lockkit's.
    """
    noun = "lock" if has_chains else "model"
    figures = lowest(tasks, "amplification")
    price = figures.get(PRICE)
    level = level_of(price.value, price.at_least) if price else NOT_MEASURED
    if price is not None and learns_again(price):
        level = "none"
    if level == NOT_MEASURED and not missing:
        missing = [f"a larger budget (--steps): no attack reached the target on the {noun}"]
    if missing:
        sentence = f"Not measured: this audit lacks {'; '.join(missing)}."
        return Verdict(level="not measured", sentence=sentence, missing=missing, rules=RULES)
    parts = [f"This {noun} {_WORTH[level]}: {_informed(figures, unlocks, near, noun)}", _scripts(tasks, noun)]
    if not math.isfinite(perplexity_ratio):
        parts.append(f"The {noun} itself is broken: its perplexity is not finite.")
    elif perplexity_ratio > DAMAGED:
        parts.append(
            f"The {noun} itself has {perplexity_ratio:.2f} times the original's perplexity, so its resistance says less."
        )
    if not has_chains:
        parts.append("It has none of lockkit's chains, so no unlock was tried.")
    return Verdict(level=level, sentence=" ".join(parts), missing=[], rules=RULES)


def lacking(informed: dict[str, bool], has_baseline: bool, has_chains: bool) -> list[str]:
    """What has to run on the lock before an audit can say anything.

    Args:
        informed: whether an attack uses knowledge of the lock, by name; without the baseline, controls, probes and
            scripts off the shelf.
        has_baseline: whether the baseline runs on the lock.
        has_chains: whether the lock is one of lockkit's.
    """
    missing = [] if has_baseline else ["the baseline (full-ft) on the lock"]
    if has_chains and not any(informed.values()):
        missing.append("an attack that uses knowledge of the lock, such as corrected-stack")
    elif not informed:
        missing.append("an attack besides the baseline and scripts off the shelf")
    return missing


def lowest(tasks: dict[str, TaskSummary], kind: str) -> dict[str, Amplification]:
    """By resource, the lowest amplification over all tasks: that with the lowest value, else that with the lowest bound."""
    found: dict[str, Amplification] = {}
    for resource in RESOURCES:
        known = [value for task in tasks.values() if (value := getattr(task, kind).get(resource))]
        if known:
            found[resource] = min(known, key=_order)
    return found


def learns_again(price: Amplification) -> bool:
    """Whether an attack reached a target that the original is at without fine-tuning: there is no ratio."""
    return price.original == 0 and price.locked is not None


def _order(found: Amplification) -> tuple[bool, float]:
    return found.value is None, found.value if found.value is not None else found.at_least or 0.0


def _informed(figures: dict[str, Amplification], unlocks: dict[str, dict[str, Any]], near: set[str], noun: str) -> str:
    known = [figures[key].value for key in SHOWN if key in figures]
    values = [value for value in known if value is not None]
    price = figures[PRICE]
    if learns_again(price):
        return (
            f"{price.best_attack} reached the target loss, which the original has without fine-tuning, after "
            f"{figures['tokens'].locked or 0:,.0f} tokens."
        )
    if price.value is None:
        assert price.at_least is not None, "the level would be `not measured`"
        return f"no attack reached the target, at {times(price.at_least)} times the operations of the original."
    cost = f"fine-tuning it costs {span(values)} times as much as fine-tuning the original"
    return f"{cost}, by the cheapest attack for each resource.{_unlocked(unlocks, near)}"


def _unlocked(unlocks: dict[str, dict[str, Any]], near: set[str]) -> str:
    """That the lock was undone, if an unlock did that."""
    ordinary = [u for label, u in unlocks.items() if label in near and u["valid"] and u["blocks"] == 1]
    if not ordinary:
        return ""
    best = min(ordinary, key=lambda u: u["cost"]["tokens"])
    data = f"{best['cost']['tokens']:,} tokens of text" if best["cost"]["tokens"] else "no data"
    return f" {best['attack']} turned it back into the original's architecture with {data}."


def _scripts(tasks: dict[str, TaskSummary], noun: str) -> str:
    """What scripts off the shelf cost."""
    figures = lowest(tasks, "off_the_shelf")
    if not figures:
        return "Unmodified fine-tuning scripts were not measured."
    price, memory, saved = (figures.get(key) for key in ("flops", "peak_tensor_bytes", "saved_bytes"))
    if price and learns_again(price):
        tokens = figures["tokens"].locked or 0
        return f"Unmodified fine-tuning scripts reached it after {tokens:,.0f} tokens."
    if price is None or price.value is None:
        return f"Unmodified fine-tuning scripts did not reach the target on the {noun} in this budget."
    said = f"Unmodified fine-tuning scripts ask for {times(price.value)} times the operations"
    more = [
        f"{times(found.value, exact=True)} times {what}"
        for found, what in ((memory, "the peak memory"), (saved, "the memory for the backward pass"))
        if found and found.value is not None
    ]
    return f"{', '.join([said, *more[:-1]])}{' and ' + more[-1] if more else ''}."
