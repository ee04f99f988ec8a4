"""Exponential means of a noisy curve, value by value or as a whole.

It is 15 lines, so no library such as pandas is needed.
"""

from __future__ import annotations

from collections.abc import Iterable


class Smoothing:
    """An exponential mean without a bias at its beginning.

    A mean that starts at 0, or at the first value, stays close to that for 1 / (1 - decay) values, which is all of a
    short run. So the weights of the values so far are scaled to sum to 1, as Adam does (Kingma and Ba 2015, arXiv
    1412.6980, section 3).

    Args:
        decay: the part of the mean that is kept with each new value, from 0 on and below 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def take(self, value: float) -> float:
        """Add `value` and return the mean of all values so far."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


def smoothed(values: Iterable[float], decay: float) -> list[float]:
    """Return the mean after each of `values`."""
    mean = Smoothing(decay)
    return [mean.take(value) for value in values]
