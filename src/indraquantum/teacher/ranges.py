"""The allowed range of each stored figure of a teacher's signals, with room for the rounding of the format."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from indraquantum.teacher.manifest import Identity

SLACK = 2.0**-10  # float16 may round a figure past its range by this share; subnormal numbers by less than 1e-7
TINY = 1e-7


class Range(NamedTuple):
    """The range of a stored figure, widened for rounding."""

    low: float
    high: float

    def first_outside(self, values: np.ndarray) -> int | None:
        """Return the place of the first value outside the range, where nan counts as outside; None if there is none."""
        # Two numbers decide for almost every array; nan spreads to both. As float64: float16 would round the range.
        if not len(values) or (float(values.min()) >= self.low and float(values.max()) <= self.high):
            return None
        values = values.astype(np.float64)
        return int(np.flatnonzero(~((values >= self.low) & (values <= self.high)))[0])


PROBABILITY = Range(0, 1 + 1e-6)  # of a float32 softmax
LOGPROB = Range(-65_504.0, 0.0)  # float16's lowest


def figure_ranges(identity: Identity) -> dict[str, Range]:
    """Return the ranges of a shard's scalar tensors. `next_logprob` may also be nan where there is no label."""
    size = identity.vocabulary_size
    entropy = Range(-SLACK, float(np.log(size)) * (1 + SLACK) + SLACK)
    # A server's probabilities are over its own vocabulary, which may be larger.
    confidence = Range(0.0 if identity.served else (1 - SLACK) / size - TINY, 1.0)
    names = ("entropy", "entropy_low", "entropy_high", "temperature_entropy")
    return dict.fromkeys(names, entropy) | {"confidence": confidence, "next_logprob": LOGPROB}
