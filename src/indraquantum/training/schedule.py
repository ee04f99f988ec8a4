"""The rows of a batch and the learning rate, as pure functions of the step.

Nothing here has a state, so a run needs only one integer to resume, its step, and the number of processes changes
nothing. The cached order of an epoch only saves time.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np

Schedule = Literal["cosine", "wsd", "constant"]
# The rule that orders the rows of an epoch. Rule 1, of runs begun before 2026-11-28, is `Generator.permutation`, which
# another version of NumPy may change. Rule 2 sorts raw numbers of NumPy's Philox, which never change (NEP 19).
ORDER = 2


def rows_of_step(
    num_rows: int, rows_per_step: int, seed: int, step: int, stage: int = 0, rule: int = ORDER
) -> np.ndarray:
    """Return the rows of the batch at `step`, counted from 0 over all epochs of a stage.

    Each epoch uses every row once, in an order that depends only on seed, stage and epoch. Its last batch may be
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


@functools.lru_cache(maxsize=2)  # consecutive steps ask for the same epoch; it takes 8 bytes a row
def _order(num_rows: int, seed: int, stream: int, rule: int) -> np.ndarray:
    """Return a random order of range(num_rows), (num_rows,) int64, which the key (seed, stream) decides."""
    philox = np.random.Philox(key=[seed, stream])
    if rule == 1:
        return np.random.Generator(philox).permutation(num_rows)
    # The low bits of a random number are replaced by the row's number. So no two are equal, and the order is unique.
    low = np.uint64(max(1, (num_rows - 1).bit_length()))
    numbers = philox.random_raw(num_rows) >> low << low | np.arange(num_rows, dtype=np.uint64)
    numbers.sort()
    return (numbers & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Return the number of optimiser steps in which every row is used once."""
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
    """Return the learning rate at `step` as a multiple of the peak rate.

    Args:
        step: the step, counted from 0, below `total_steps`.
        total_steps: the number of steps of the run, or of the stage.
        warmup_fraction: the fraction of the steps over which the rate rises in a straight line to 1.
        schedule: what follows. With cosine, the rate falls from 1 to `final_rate`. With wsd (warm-up, stable, decay:
            MiniCPM, arXiv 2404.06395), it stays at 1 and then falls in a straight line to `final_rate`. With constant,
            it stays at 1.
        decay_fraction: the last fraction of the steps, over which wsd decays.
        final_rate: the value of cosine and wsd at `total_steps`, the step after the last.
        planned_steps: the value of `total_steps` when the run began, which decides the length of the warm-up. By
            default it is `total_steps`.
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
    """Return the number of steps before wsd begins to decay."""
    return total_steps - max(1, round(decay_fraction * total_steps))
