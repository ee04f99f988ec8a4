"""What changes over a run, each as a pure function of the step: the rows of a batch, learning rate, loss weights.

Nothing here has a state, so that resuming needs one integer, the step, and the number of workers changes nothing. What
is kept from call to call, the order of an epoch, only saves time.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np

Schedule = Literal["cosine", "wsd", "constant"]
# Which rule orders the rows of an epoch. 1, of runs begun before 2026-11-28: NumPy's `Generator.permutation`, which
# another version of NumPy may change. 2: the raw numbers of its Philox, promised for good (NEP 19), in ascending order.
ORDER = 2


def rows_of_step(
    num_rows: int, rows_per_step: int, seed: int, step: int, stage: int = 0, rule: int = ORDER
) -> np.ndarray:
    """The rows of the batch at `step`, counted from 0 over all epochs of a stage.

    Each epoch visits every row once, in an order that depends on (seed, stage, epoch) alone; its last batch may be
    smaller.

    Args:
        num_rows: rows of the training split.
        rows_per_step: rows in a full batch.
        seed: the run's seed.
        step: optimiser step of the stage, from 0.
        stage: number of the strategy's stage, from 0.
        rule: see ORDER.

    Returns:
        int64 row numbers, at most `rows_per_step`.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_rows, rows_per_step))
    order = _order(num_rows, seed, epoch + (stage << 32), rule)
    return order[step_in_epoch * rows_per_step : (step_in_epoch + 1) * rows_per_step].copy()


@functools.lru_cache(maxsize=2)  # a run asks for the same epoch step by step, or for the last step again; 8 bytes a row
def _order(num_rows: int, seed: int, stream: int, rule: int) -> np.ndarray:
    """A random order of range(num_rows), (num_rows,) int64, that key (seed, stream) decides."""
    philox = np.random.Philox(key=[seed, stream])
    if rule == 1:
        return np.random.Generator(philox).permutation(num_rows)
    # A row's number stands in the low bits of its random number: so no two are equal, and any sort gives one result.
    low = np.uint64(max(1, (num_rows - 1).bit_length()))
    numbers = philox.random_raw(num_rows) >> low << low | np.arange(num_rows, dtype=np.uint64)
    numbers.sort()
    return (numbers & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


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
    planned_steps: int | None = None,
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
        planned_steps: what `total_steps` was when the run was begun, which the warm-up is a part of; by default the
            same.
    """
    warmup_steps = max(1, round(warmup_fraction * (planned_steps or total_steps)))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        begin = decay_begins(total_steps, decay_fraction)
        return 1 - (1 - final_rate) * max(0, step - begin) / (total_steps - begin)
    return 1.0


def decay_begins(total_steps: int, decay_fraction: float) -> int:
    """Steps of wsd before its decay, which are all at the peak but for the warm-up."""
    return total_steps - max(1, round(decay_fraction * total_steps))
