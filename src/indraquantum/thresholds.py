"""The thresholds of the collapse figures: the guard of training checks them, and the monitor draws them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A figure has collapsed if it is below `fraction` of its best value, and this value was at least `meaningful`."""

    fraction: float
    meaningful: float


THRESHOLDS = {
    "context_divergence": Threshold(fraction=0.25, meaningful=0.2),
    "phase_rise": Threshold(fraction=0.1, meaningful=0.3),
    "magnitude_rise": Threshold(fraction=0.1, meaningful=0.2),
    "effective_rank": Threshold(fraction=0.1, meaningful=4.0),
}
