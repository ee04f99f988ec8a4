"""The minutes to a loss, as benchmarks/time_to_loss.py reads them off the curves of runs."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "time_to_loss.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("time_to_loss", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(*curve, steps=10, minutes_before=0):
    """A run with the seconds and losses of `curve`."""
    points = [(seconds, loss, 0) for seconds, loss in curve]
    return {"curve": points, "steps": steps, "minutes_before": minutes_before}


@pytest.mark.parametrize(
    ("target", "minutes"),
    [(6, 1), (5, 1.5), (4.5, 1.75), (3.9, math.inf)],
)
def test_a_loss_between_two_evaluations_is_interpolated(benchmark, target, minutes):
    curve = (0, 10), (60, 6), (120, 4), (180, 4.2), (240, 4)
    assert benchmark.minutes_to(record(*curve), target) == pytest.approx(minutes)
    assert benchmark.minutes_to(record(*curve, minutes_before=3), target) == pytest.approx(minutes + 3)


def test_the_median_of_the_best_length_counts(benchmark):
    early = [record((0, 10), (60 * minutes, 4), steps=5) for minutes in (1, 2, 6)]
    late = [record((0, 10), (60 * minutes, 4), steps=9) for minutes in (4, 4, 4)]
    assert benchmark.best_minutes(early + late, 4) == (2, True)


def test_what_no_run_reached_takes_longer_than_the_longest(benchmark):
    runs = [record((0, 10), (60 * minutes, 4), steps=minutes) for minutes in (1, 7)]
    assert benchmark.best_minutes(runs, 3) == (7, False)
