"""What changes over a run, each as a pure function of the step: the rows of a batch, learning rate, loss weights.

Nothing here has a state, so that resuming needs one integer, the step, and the number of workers changes nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Schedule = Literal["cosine", "wsd", "constant"]


def rows_of_step(num_rows: int, rows_per_step: int, seed: int, step: int, stage: int = 0) -> np.ndarray:
    """The rows of the batch at `step`, counted from 0 over all epochs of a stage.

    Each epoch visits every row once, in an order that depends on (seed, stage, epoch) alone; its last batch may be
    smaller.

    Args:
        num_rows: rows of the training split.
        rows_per_step: rows in a full batch.
        seed: the run's seed.
        step: optimiser step of the stage, from 0.
        stage: number of the strategy's stage, from 0.

    Returns:
        int64 row numbers, at most `rows_per_step`.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_rows, rows_per_step))
    order = np.random.Generator(np.random.Philox(key=[seed, epoch + (stage << 32)])).permutation(num_rows)
    return order[step_in_epoch * rows_per_step : (step_in_epoch + 1) * rows_per_step]


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimiser steps that visit every row once."""
    return math.ceil(num_rows / rows_per_step)


def learning_rate_factor(
    step: int,
    total_steps: int,
    warmup_fraction: float,
    schedule: Schedule = "cosine",
    decay_fraction: float = 0.2,
    final_rate: float = 0.1,
) -> float:
    """Multiple of the peak learning rate at `step`, counted from 0.

    Args:
        step: in [0, total_steps).
        total_steps: of the run, or of the stage.
        warmup_fraction: part of the steps over which it rises in a straight line to 1.
        schedule: what follows. cosine: from 1 down to `final_rate`; wsd, warm-up, stable, decay (MiniCPM, arXiv
            2404.06395): 1, then in a straight line down to `final_rate`; constant: 1.
        decay_fraction: last part of the steps, over which wsd decays.
        final_rate: where cosine and wsd would be at `total_steps`, the step after the last.
    """
    warmup_steps = max(1, round(warmup_fraction * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        decay_steps = max(1, round(decay_fraction * total_steps))
        return 1 - (1 - final_rate) * max(0, step - (total_steps - decay_steps)) / decay_steps
    return 1.0
