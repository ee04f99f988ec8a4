"""Means with 95 % intervals over seeds, by Student's t.

The quantile is computed here, in 30 lines, because scipy would be a large dependency for this one number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the half-width of its interval."""

    mean: float
    half_width: float | None  # of the 95 % interval; None for a single value
    count: int

    def clear_of_zero(self) -> bool:
        """Return whether the interval lies on one side of 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t.

    Args:
        probability: in (1/2, 1).
        degrees: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _two_tails(high, degrees) > 2 * (1 - probability):
        low, high = high, 2 * high
    for _ in range(60):  # bisection down to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _two_tails(middle, degrees) > 2 * (1 - probability) else (low, middle)
    return high


def _two_tails(quantile: float, degrees: int) -> float:
    """P(|t| > quantile) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + quantile^2)."""
    from mpmath import betainc

    return betainc(degrees / 2, 0.5, 0, degrees / (degrees + quantile**2), regularized=True)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of `values`, one for each seed, with its 95 % interval.

    Raises:
        statistics.StatisticsError: there is no value.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, count)
    error = statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, t_quantile((1 + LEVEL) / 2, count - 1) * error, count)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Return first minus second at each seed that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}
