"""Figures in bins: small enough to keep for every run, and enough to plot calibration and readouts.

Legend: N positions.
"""

from __future__ import annotations

import math

import numpy as np

from indraquantum.evaluation.figures import CALIBRATION_BINS, Predictions, bins_of
from indraquantum.teacher.signals import SignalStore

READOUT_BINS = 10
Bins = dict[str, list[float]]  # count, x (mean), y (mean), y_std: an entry for each bin that is not empty


def binned(bin_N: np.ndarray, x_N: np.ndarray, y_N: np.ndarray) -> Bins:
    """Return the mean of `x_N`, and the mean and standard deviation of `y_N`, for each bin that has positions."""
    _, bin_N, count = np.unique(bin_N, return_inverse=True, return_counts=True)
    x, y = np.bincount(bin_N, x_N) / count, np.bincount(bin_N, y_N) / count
    std = np.sqrt(np.bincount(bin_N, (y_N - y[bin_N]) ** 2) / count)
    return {"count": count.tolist(), "x": x.tolist(), "y": y.tolist(), "y_std": std.tolist()}


def calibration_bins(found: Predictions) -> Bins:
    """Return accuracy (y) over the confidence (x) of the likeliest token, in the bins of the calibration error."""
    return binned(bins_of(found.confidence_N, CALIBRATION_BINS), found.confidence_N, found.correct_N.astype(float))


def readout_bins(found: Predictions, signals: SignalStore, vocabulary_size: int) -> dict[str, Bins]:
    """Return the readouts (y) over the teacher's figures (x): magnitude over confidence, phase over entropy in nats."""
    teacher = signals.batch("validation", found.index_N)
    known_N = (teacher.ids_NK >= 0).any(dim=1).numpy()
    confidence_N, entropy_N = (part.double().numpy()[known_N] for part in (teacher.confidence_N, teacher.entropy_N))
    share_N = entropy_N / math.log(vocabulary_size)
    return {
        "magnitude": binned(bins_of(confidence_N, READOUT_BINS), confidence_N, found.magnitude_N[known_N]),
        "phase": binned(bins_of(share_N, READOUT_BINS), entropy_N, found.phase_N[known_N]),
    }
