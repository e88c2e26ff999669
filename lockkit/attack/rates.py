"""The search for an attack's learning rate.

1. Rates are those of `RATES`, from 1e-6 to 1e-2, two per decade. An attack multiplies them by a factor of its own.
2. The baseline on the original starts at a rate that suits the number of its parameters. Every other search starts at the
   best rate of the search before it: that of the baseline, or that of the same attack on the original.
3. The neighbours of the best rate are tried, the higher one first, until both are worse: the search stops where the loss
   turns.
4. The search on the lock and that on the original have equal trials. The one that stopped first goes on with the rates
   nearest to its best.

A trial is better if it reaches the target in fewer steps. Without a target (the baseline on the original, which sets it)
or if the target is not reached, it is better if its lowest held-out loss is lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RATES = (*(float(f"{digit}e{power}") for power in range(-6, -2) for digit in (1, 3)), 1e-2)


def starting_rate(parameters: int) -> float:
    """Where the baseline's search begins: 1e-3 for 4 million parameters, less for more. It only saves trials."""
    return nearest(1e-3 * (4e6 / max(1, parameters)) ** 0.8)


def nearest(rate: float) -> float:
    """The rate in `RATES` that is nearest to `rate`, by their ratio."""
    return min(RATES, key=lambda known: abs(math.log(known / rate)))


@dataclass
class RateSearch:
    """The search on one model.

    Attributes:
        start: the first rate, in `RATES`.
        tried: the value of each trial, by its rate; lower is better, infinity if it failed.
        limit: after how many steps a trial can no longer be the best; None if none has reached the target.
    """

    start: float
    tried: dict[float, float] = field(default_factory=dict)
    limit: int | None = None

    @property
    def best(self) -> float:
        """The best rate; of equal ones the lowest. `start` before the first trial."""
        return min(self.tried, key=lambda rate: (self.tried[rate], rate), default=self.start)

    @property
    def value(self) -> float:
        """The value of the best rate."""
        return self.tried.get(self.best, math.inf)

    def next(self) -> float | None:
        """The next rate to try; None where the search stops."""
        if not self.tried:
            return self.start
        place = RATES.index(self.best)
        neighbours = [RATES[near] for near in (place + 1, place - 1) if 0 <= near < len(RATES)]
        return next((rate for rate in neighbours if rate not in self.tried), None)

    def another(self) -> float | None:
        """The rate nearest to the best that was not tried, after the search has stopped; None if all were."""
        left = [rate for rate in RATES if rate not in self.tried]
        return min(left, key=lambda rate: (abs(math.log(rate / self.best)), -rate), default=None)
