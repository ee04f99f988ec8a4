"""Exponential means of a noisy curve, as it comes or as a whole."""

from __future__ import annotations

from collections.abc import Iterable


class Smoothing:
    """An exponential mean that is right from its first value on.

    A mean that begins at 0, or at the first value, is drawn to that for 1 / (1 - decay) values: all of a short run. So
    the weights of the values seen so far are scaled to sum to 1, as Adam does (Kingma and Ba 2015, arXiv 1412.6980,
    section 3).

    Args:
        decay: part of the mean that stays with each value, from 0 on and below 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def take(self, value: float) -> float:
        """Take in `value`; the mean of all so far."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


def smoothed(values: Iterable[float], decay: float) -> list[float]:
    """The mean after each of `values`."""
    mean = Smoothing(decay)
    return [mean.take(value) for value in values]
