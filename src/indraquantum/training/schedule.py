"""What changes over a run, each as a pure function of the step: the rows of a batch, learning rate, loss weights.

Nothing here has a state, so that resuming needs one integer, the step, and the number of workers changes nothing.
"""

from __future__ import annotations

import math

import numpy as np

FINAL_RATE = 0.1  # the cosine ends at this part of the peak, as in the replica of the design


def rows_of_step(num_rows: int, rows_per_step: int, seed: int, step: int) -> np.ndarray:
    """The rows of the batch at `step`, counted from 0 over all epochs.

    Each epoch visits every row once, in an order that depends on (seed, epoch) alone; its last batch may be smaller.

    Args:
        num_rows: rows of the training split.
        rows_per_step: rows in a full batch.
        seed: the run's seed.
        step: optimiser step, from 0.

    Returns:
        int64 row numbers, at most `rows_per_step`.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_rows, rows_per_step))
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)
    return order[step_in_epoch * rows_per_step : (step_in_epoch + 1) * rows_per_step]


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimiser steps that visit every row once."""
    return math.ceil(num_rows / rows_per_step)


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Multiple of the peak learning rate at `step`: linear rise, then a cosine from 1 down to FINAL_RATE."""
    warmup_steps = max(1, round(warmup_fraction * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_weight(start: float, end: float, step: int, total_steps: int) -> float:
    """A loss weight that goes from `start` at the first step to `end` at the last, by progress."""
    return start + (end - start) * step / max(1, total_steps - 1)
