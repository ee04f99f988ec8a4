"""The learning-rate range test (Smith 2017, arXiv 1506.01186) of `indra lr-test`: the rate rises until the loss does.

    indra lr-test --data data/mixed_train --steps 100

Each step takes the next batch of the run that `indra train` would start. From step to step, the rate rises by the same
factor. The test gives a picture and a suggestion: the rate at which the loss falls most steeply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from indraquantum.config import LrTestSettings
from indraquantum.errors import TrainingStopped, UserError
from indraquantum.files import atomic_file, check_new_file
from indraquantum.progress import Progress
from indraquantum.smoothing import Smoothing, smoothed
from indraquantum.training.run import Run, trial_run
from indraquantum.training.step import StepInput

SUFFIXES = (".png", ".pdf", ".svg")
SMOOTHING = 0.8  # the weight of the past in the exponential mean of the losses
DIVERGED = 1.5  # the test ends if the loss is this many times the first one


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test."""

    rates: list[float]  # the rates of the steps
    losses: list[float]
    smoothed: list[float]  # without a lag: a mean of the steps before and after
    suggested: float | None  # None if no rate lowers the loss


def lr_range_test(settings: LrTestSettings) -> RangeTest:
    """Run the test, print the suggestion and write the picture. No run is saved.

    Raises:
        UserError: settings, data or signals that don't fit, or a picture of no known kind.
        OutOfMemory: a step does not fit into the memory of the device.
    """
    if settings.dry_run:
        raise UserError("--dry-run", True, "must be left out, because a range test leaves no run behind")
    if settings.minutes is not None:
        raise UserError("--minutes", f"{settings.minutes:g}", "must be left out, because --steps sets the length here")
    if settings.picture.suffix not in SUFFIXES:
        raise UserError("--picture", settings.picture, f"must end in {', '.join(SUFFIXES)}")
    if settings.highest_rate <= settings.lowest_rate:
        allowed = f"must be above --lowest-rate {settings.lowest_rate:g}"
        raise UserError("--highest-rate", f"{settings.highest_rate:g}", allowed)
    check_new_file("--picture", settings.picture)
    run = trial_run(settings)
    found = climb(run, rising_rates(settings.lowest_rate, settings.highest_rate, settings.steps))
    _draw(settings, found)
    if found.suggested is None:
        print(f"No rate lowers the loss within {len(found.rates)} steps; see {settings.picture}.")
    else:
        print(f"Suggested: --learning-rate {found.suggested:.1e}, where the loss falls most steeply; wrote "
              f"{settings.picture}. {len(found.rates)} steps, lowest loss at {lowest(found):.1e}.")  # fmt: skip
    return found


def rising_rates(lowest_rate: float, highest_rate: float, steps: int) -> list[float]:
    """Return rates from the lowest to the highest, in equal ratios."""
    return np.geomspace(lowest_rate, highest_rate, steps).tolist()


def climb(run: Run, rates: Sequence[float]) -> RangeTest:
    """Do a step of `run` at each of `rates`, until the loss has clearly risen or is not finite.

    Rows come from the strategy's first stage; the weights stay as they are at its first step.
    """
    losses, mean = [], Smoothing(SMOOTHING)
    with Progress("lr-test", len(rates), "steps") as progress:
        for number, rate in enumerate(rates):
            try:
                losses.append(_loss_of(run, step_at(run, number, rate)))
            except TrainingStopped:
                break
            level = mean.take(losses[-1])
            progress.update(1, f"loss {losses[-1]:.3f}, learning rate {rate:.2e}")
            if level > DIVERGED * losses[0]:
                break
    taken, smooth = list(rates[: len(losses)]), smoothed_both_ways(losses)
    return RangeTest(taken, losses, smooth, suggested_rate(taken, smooth))


def smoothed_both_ways(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean forwards, and then backwards over that, so that it does not lag behind the losses.

    A loss counts as at most DIVERGED times the first one. Else the last losses would raise the mean of all others.
    """
    capped = [min(loss, DIVERGED * losses[0]) for loss in losses]
    return smoothed(smoothed(capped, SMOOTHING)[::-1], SMOOTHING)[::-1]


def step_at(run: Run, number: int, rate: float) -> StepInput:
    """Return the first step of `run` at `rate`, with the rows and the dropout of step `number`."""
    stage = run.plan.at(0)
    own = stage.step(number)
    return replace(stage.step(0), rows=own.rows, seed=own.seed, learning_rate=rate)


def _loss_of(run: Run, step: StepInput) -> float:
    with run.step_fits():
        return run.engine.step(step).terms["loss"]


def suggested_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the rate, before the lowest loss, at which losses fall most steeply over the logarithm of the rate."""
    end = int(np.argmin(losses)) + 1 if losses else 0
    if end < 3:
        return None
    slopes = np.gradient(np.array(losses[:end]), np.log(rates[:end]))
    steepest = int(np.argmin(slopes))
    return rates[steepest] if slopes[steepest] < 0 and math.isfinite(slopes[steepest]) else None


def lowest(found: RangeTest) -> float:
    """Return the rate at which the smoothed loss was lowest."""
    return found.rates[int(np.argmin(found.smoothed))]


def _draw(settings: LrTestSettings, found: RangeTest) -> None:
    from indraquantum.monitor.plots import save_range_test

    with atomic_file(settings.picture) as temporary:
        kind = settings.picture.suffix.removeprefix(".")
        save_range_test(temporary, kind, found.rates, found.losses, found.smoothed, found.suggested)
