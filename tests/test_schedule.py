"""The schedules are pure functions: every row once an epoch, the same whatever came before."""

from __future__ import annotations

import math

import numpy as np
import pytest

from indraquantum.training.schedule import (
    learning_rate_factor,
    rows_of_step,
    steps_per_epoch,
)


def test_each_epoch_visits_every_row_once():
    num_rows, rows_per_step = 23, 5
    assert steps_per_epoch(num_rows, rows_per_step) == 5
    for epoch in range(3):
        rows = np.concatenate([rows_of_step(num_rows, rows_per_step, 7, epoch * 5 + step) for step in range(5)])
        assert sorted(rows) == list(range(num_rows))


def test_order_changes_with_epoch_and_seed_only():
    first = rows_of_step(101, 101, 3, 0)
    np.testing.assert_array_equal(first, rows_of_step(101, 101, 3, 0))
    assert (first != rows_of_step(101, 101, 3, 1)).any()
    assert (first != rows_of_step(101, 101, 4, 0)).any()


def test_each_stage_has_its_own_order():
    first, second = (rows_of_step(101, 101, 3, 0, stage) for stage in (0, 1))
    assert (first != second).any()
    assert sorted(second) == list(range(101))
    assert (rows_of_step(101, 101, 3, 1, 0) != second).any()


def factors(*, steps=100, warmup=0.1, **options):
    return [learning_rate_factor(step, steps, warmup, **options) for step in range(steps)]


def test_cosine_rises_then_falls_along_half_a_cosine():
    found = factors()
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == max(found) == 1.0
    assert found[55] == pytest.approx(0.1 + 0.9 / 2)  # half way down: 10 + 90/2
    assert found[40] == pytest.approx(0.1 + 0.9 * 0.75)  # a third of the way: (1 + cos 60 degrees) / 2
    assert found[99] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert factors(final_rate=0.0)[55] == pytest.approx(0.5)
    assert learning_rate_factor(100, 100, 0.1, final_rate=0.3) == pytest.approx(0.3)


def test_wsd_rises_stays_and_decays_in_a_straight_line():
    found = factors(schedule="wsd", decay_fraction=0.4, final_rate=0.2)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:61] == [1.0] * 51  # the decay begins at step 60, still at the peak
    assert found[61:] == pytest.approx([1 - 0.8 * step / 40 for step in range(1, 40)])
    assert learning_rate_factor(100, 100, 0.1, "wsd", 0.4, 0.2) == pytest.approx(0.2)


def test_constant_rises_and_stays():
    assert factors(schedule="constant", warmup=0.02) == [0.5] + [1.0] * 99
    assert factors(schedule="constant", warmup=0.0) == [1.0] * 100
