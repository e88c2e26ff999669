"""The group, colour, marker and dashes of each attack in plots: the same in all plots and on all pages.

An attack's place in its group decides on its colour and its marker. A new attack is added at the end of a group, so that the others
keep theirs. An attack that is in no group, such as one of another package, gets a colour from its name.
"""

from __future__ import annotations

import zlib

from lockkit.report.page import MOST_LINES, LineStyle

GROUPS: dict[str, tuple[str, ...]] = {
    "Scripts off the shelf": ("hf-full", "hf-lora", "hf-qlora"),
    "All weights": ("full-ft", "trainer", "optimizers", "reparametrise", "surrogate-backward", "random-mlps"),
    "All weights, less memory": ("checkpointing", "reversal", "offload", "galore", "lomo", "badam", "mezo"),
    "Fewer weights": ("lora", "frozen-dlr", "frozen-lora", "last-layers", "side-network", "lora-fa", "qlora"),
    "Unlocks": (
        *("corrected-stack", "stack-solve", "linearised-stack", "partial-collapse", "random-features", "redistill"),
        *("merge-blocks", "prune-svd"),
    ),
}
OTHERS = "Other attacks"
# Colours between the first attacks of two groups. The headline of another group has another colour than a group's first.
SHIFT = 2
THEN = ", then "  # in the name of an unlock that another attack follows


def group_of(attack: str) -> str:
    """The group of an attack, by its name in a summary; that of an unlock, whatever follows it."""
    name = attack.partition(THEN)[0]
    return next((group for group, names in GROUPS.items() if name in names), OTHERS)


def style_of(attack: str) -> LineStyle:
    """The style of an attack. After an unlock, colour is that of the unlock; marker and dashes are those of what follows."""
    unlock, _, then = attack.partition(THEN)
    colour, marker = _place(unlock) + SHIFT * _group(unlock), _place(then or unlock)
    return LineStyle(colour % MOST_LINES, marker, 1 + _group(then) if then else 0)


def in_order(attacks: list[str]) -> list[str]:
    """Attacks in the order of their groups. It does not depend on results."""
    return sorted(attacks, key=lambda attack: (_group(attack), THEN in attack, _place(attack), attack))


def _group(attack: str) -> int:
    """The place of an attack's group."""
    return [*GROUPS, OTHERS].index(group_of(attack))


def _place(attack: str) -> int:
    """The place of an attack in its group, or a number from its name."""
    name = attack.partition(THEN)[0]
    group = GROUPS.get(group_of(name), ())
    return group.index(name) if name in group else zlib.crc32(name.encode()) % MOST_LINES
