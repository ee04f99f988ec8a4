"""Curves with a bounded number of points, whatever the number of rows: the extremes of each stretch of rows survive.

A stretch of `every` rows is kept as two points for each column: its lowest and its highest value, in the order in which
they came. So a spike of a single step stays visible in a run of a million steps. Once there are `CAPACITY` stretches,
neighbours are merged and `every` doubles.

Legend: n rows, k rows of a stretch, S columns. NaN is a value that a row does not have.
"""

from __future__ import annotations

from functools import cache

import numpy as np

CAPACITY = 1024  # stretches, which is more than a screen has room for; even
BLOCK = 256  # values that a mean takes at once


class Points:
    """The extremes of some columns over the rows added so far.

    Attributes:
        every: rows of a stretch; 1 as long as all rows are kept.
        complete: stretches that hold `every` rows; they change only when `every` doubles.
    """

    def __init__(self, columns: int) -> None:
        self.every, self.complete = 1, 0
        self._steps = np.zeros((CAPACITY, 2))  # the first and the last step of each stretch
        self._values = np.zeros((CAPACITY, 2, columns), np.float32)
        self._rest = np.zeros(0), np.zeros((0, columns))  # rows of the stretch that is not complete

    def add(self, steps_n: np.ndarray, values_nS: np.ndarray) -> None:
        """Add rows, whose steps ascend."""
        steps_n = np.concatenate([self._rest[0], steps_n])
        values_nS = np.concatenate([self._rest[1], values_nS])
        while len(steps_n) >= self.every:
            new = min(len(steps_n) // self.every, CAPACITY - self.complete)
            taken, end = new * self.every, self.complete + new
            steps = steps_n[:taken].reshape(new, self.every)
            self._steps[self.complete : end] = steps[:, [0, -1]]
            self._values[self.complete : end] = _extremes(values_nS[:taken].reshape(new, self.every, -1))
            self.complete, steps_n, values_nS = end, steps_n[taken:], values_nS[taken:]
            if self.complete == CAPACITY:
                self._merge()
        self._rest = steps_n.copy(), values_nS.copy()

    def _merge(self) -> None:
        half = CAPACITY // 2
        self._steps[:half] = self._steps.reshape(half, 4)[:, [0, 3]]
        self._values[:half] = _extremes(self._values.reshape(half, 4, -1))
        self.every, self.complete = 2 * self.every, half

    def since(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps (p,) and the values (p, S) of all points from stretch `first` on, the incomplete one too.

        A stretch has one point if `every` is 1, else two.
        """
        steps, values = self._steps[first : self.complete], self._values[first : self.complete].astype(float)
        if self.every == 1:
            return steps[:, 0], values[:, 0]
        if len(self._rest[0]):
            steps = np.concatenate([steps, self._rest[0][None, [0, -1]]])
            values = np.concatenate([values, _extremes(self._rest[1][None])])
        return steps.reshape(-1), values.reshape(-1, values.shape[-1])


def _extremes(values_nkS: np.ndarray) -> np.ndarray:
    """Return the lowest and the highest of k values (n, 2, S) in the order in which they came."""
    missing = np.isnan(values_nkS)
    lowest = np.where(missing, np.inf, values_nkS).argmin(axis=1, keepdims=True)
    highest = np.where(missing, -np.inf, values_nkS).argmax(axis=1, keepdims=True)
    order = np.concatenate([np.minimum(lowest, highest), np.maximum(lowest, highest)], axis=1)
    return np.take_along_axis(values_nkS, order, axis=1)


@cache
def _block_of(decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of the values of a block in the sum after each of them, and what is kept of the sum before."""
    ages = np.subtract.outer(np.arange(BLOCK), np.arange(BLOCK))
    shares = np.where(ages >= 0, (1 - decay) * decay ** np.maximum(ages, 0), 0)
    return shares, decay ** np.arange(1, BLOCK + 1)


class Means:
    """The exponential means of some columns, as `smoothing.Smoothing` gives them, for many rows at once."""

    def __init__(self, decay: float, columns: int) -> None:
        self._decay, self._sums, self._weights = decay, np.zeros(columns), np.zeros(columns)

    def take(self, values_nS: np.ndarray) -> np.ndarray:
        """Add rows and return the means (n, S) after each of them; NaN where a row has no value."""
        means_nS = np.full(values_nS.shape, np.nan)
        for column in range(values_nS.shape[1]):
            there = np.flatnonzero(~np.isnan(values_nS[:, column]))
            for begin in range(0, len(there), BLOCK):
                rows = there[begin : begin + BLOCK]
                means_nS[rows, column] = self._block(column, values_nS[rows, column])
        return means_nS

    def _block(self, column: int, values: np.ndarray) -> np.ndarray:
        count, (shares, kept) = len(values), _block_of(self._decay)
        sums = shares[:count, :count] @ values + kept[:count] * self._sums[column]
        weights = 1 - kept[:count] * (1 - self._weights[column])
        self._sums[column], self._weights[column] = sums[-1], weights[-1]
        return sums / weights
