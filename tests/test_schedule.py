"""The schedules are pure functions: every row once an epoch, the same whatever came before."""

from __future__ import annotations

import math

import numpy as np
import pytest

from indraquantum.training.schedule import (
    FINAL_RATE,
    learning_rate_factor,
    linear_weight,
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


def test_learning_rate_rises_then_falls_along_the_cosine():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[55] == pytest.approx(FINAL_RATE + (1 - FINAL_RATE) / 2)  # half way down: 10 + 90/2
    assert factors[99] == pytest.approx(FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert max(factors) == 1.0


def test_linear_weight_goes_from_start_to_end():
    assert linear_weight(0.01, 0.05, 0, 5) == 0.01
    assert linear_weight(0.01, 0.05, 2, 5) == pytest.approx(0.03)
    assert linear_weight(0.01, 0.05, 4, 5) == 0.05
    assert linear_weight(0.01, 0.05, 0, 1) == 0.01
