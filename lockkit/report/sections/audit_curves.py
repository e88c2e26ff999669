"""The plots of an audit: the held-out loss of every attack on the lock against what it spent."""

from __future__ import annotations

import itertools

from lockkit.attack.record import TaskSummary
from lockkit.attack.target import RESOURCE_TITLES as RESOURCES
from lockkit.report.attack_styles import group_of, in_order, style_of
from lockkit.report.page import MOST_LINES, Curve, Points, Section

ACROSS = ("tokens", "flops")
ON_ORIGINAL, ON_LOCK = "original's cheapest: ", "cheapest: "  # begin the labels of the two runs of the headline
PLOTS = (
    "The plots have every attack that ran on the lock, by the run that the table of attacks has, and the two runs that the "
    "headline compares. "
    "An attack has the same colour and marker in all plots and on all pages; dashes say which attack follows an unlock. "
    "Those two are in every plot: the cheapest on the lock as a thick line, the cheapest on the original as a dashed line "
    "without markers. Plots against the same resource have the same axes, except where an invalid attack needs larger ones."
)


def add_loss_plots(section: Section, figures: TaskSummary, rows: dict[str, dict]) -> None:
    """Add the plots of a task to its section, and paragraphs on what they show and lack.

    Args:
        rows: rows of the audit by key; some may be missing.
    """
    losses = [_Losses(figures, rows, resource) for resource in ACROSS]
    plots = [found.curves() for found in losses]
    # Those of one group stand beside each other.
    by_group = [*zip(*plots, strict=True)]
    of_more = [same for same in by_group if any(len(c.lines) > len(c.dashed) + len(c.thick) for c in same)]
    drawn = [curve for same in of_more or by_group[:1] for curve in same if curve.lines]
    section.curves += drawn
    lacking = dict.fromkeys(name for found in losses for name in found.lacking)
    if not drawn:
        section.text.append("No plots: rows.jsonl has no losses of these runs.")
        return
    section.text.append(PLOTS)
    if lacking:
        section.text.append(f"Not in the plots, because rows.jsonl has no losses of their runs: {'; '.join(lacking)}.")


class _Losses:
    """The losses of a task against one resource.

    Attributes:
        headline: points of the cheapest runs: on the original, then on the lock; by label.
        best: the attack of the second; None if there is none.
        attacks: points of each attack on the lock, by its name. Empty if its losses are not known, or if it is `best`.
        lacking: labels and names of runs whose losses are not known.
    """

    def __init__(self, figures: TaskSummary, rows: dict[str, dict], resource: str):
        self.figures, self.rows, self.resource = figures, rows, resource
        found = figures.amplification.get(resource)
        self.best = found.best_attack if found else None
        self.headline: dict[str, Points] = {}
        if found and found.original_run:
            self.headline[f"{ON_ORIGINAL}{found.best_attack_original}"] = self._points(found.original_run)
        if found and found.locked_run:
            self.headline[f"{ON_LOCK}{self.best}"] = self._points(found.locked_run)
        ran = {line.attack: line.locked.id for line in figures.attacks if line.locked}
        self.attacks = {name: [] if name == self.best else self._points(ran[name]) for name in in_order([*ran])}
        known = self.attacks | self.headline
        self.lacking = [name for name, points in known.items() if not points and name != self.best]

    def _points(self, run_id: str) -> Points:
        curves = (row["curve"] for key, row in self.rows.items() if key.startswith(run_id))
        points: list[dict] = next(curves, [])
        return [(point[self.resource], point["loss"]) for point in points if point[self.resource] and point["step"]]

    def curves(self) -> list[Curve]:
        """One plot for each group of attacks, and more if a group has many. The same ones for all resources."""
        found = []
        for group, own in itertools.groupby(self.attacks, group_of):
            names = [*own]
            parts = [names[start : start + MOST_LINES] for start in range(0, len(names), MOST_LINES)]
            for count, part in enumerate(parts, 1):
                title = f"{group} ({count} of {len(parts)})" if len(parts) > 1 else group
                found.append(self._curve(title, [name for name in part if self.attacks[name]]))
        return found

    def _curve(self, title: str, names: list[str]) -> Curve:
        invalid = {line.attack for line in self.figures.attacks if not line.valid}
        labels = {name: f"{name} (invalid)" if name in invalid else name for name in names}
        styles = {label: style_of(name) for name, label in labels.items()}
        if self.best:
            styles[f"{ON_LOCK}{self.best}"] = style_of(self.best)
        lines = {label: points for label, points in self.headline.items() if points}
        valid = {name: points for name, points in self.attacks.items() if name not in invalid}
        return Curve(
            f"{title}: {RESOURCES[self.resource]}",
            RESOURCES[self.resource],
            "loss, nats per label",
            lines | {label: self.attacks[name] for name, label in labels.items()},
            log=True,
            dashed=[label for label in lines if label.startswith(ON_ORIGINAL)],
            thick=[label for label in lines if label.startswith(ON_LOCK)],
            level=("target", self.figures.target_loss),
            styles=styles,
            frame=[point for points in (self.headline | valid).values() for point in points],
        )
