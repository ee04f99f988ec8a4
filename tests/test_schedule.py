"""The schedules are pure functions. Each row comes once in an epoch, and earlier calls change nothing."""

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


# Philox 4x64-10 of Salmon et al. 2011 (Parallel random numbers: as easy as 1, 2, 3), section 3.3.
MULTIPLIERS, WEYL = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Its first `count` numbers, counting from 1 as NumPy does."""
    found, word = [], (1 << 64) - 1
    for counter in range(1, count // 4 + 2):
        x, k = [counter, 0, 0, 0], list(key)
        for _ in range(10):
            high, low = zip(
                *(divmod(m * v, 1 << 64) for m, v in zip(MULTIPLIERS, (x[0], x[2]), strict=True)), strict=True
            )
            x = [high[1] ^ x[1] ^ k[0], low[1], high[0] ^ x[3] ^ k[1], low[0]]
            k = [(part + step) & word for part, step in zip(k, WEYL, strict=True)]
        found += x
    return found[:count]


@pytest.mark.parametrize(("num_rows", "seed", "epoch", "stage"), [(23, 7, 0, 0), (1000, 2**63 - 1, 3, 2), (1, 0, 0, 0)])
def test_the_order_is_that_of_philox_by_hand(num_rows, seed, epoch, stage):
    """Rows are in the ascending order of their random numbers, in all versions of NumPy."""
    numbers = philox((seed, epoch + (stage << 32)), num_rows)
    expected = sorted(range(num_rows), key=lambda row: numbers[row])
    assert rows_of_step(num_rows, num_rows, seed, epoch, stage).tolist() == expected


def test_the_order_is_frozen():
    """These numbers are from 2026-11-28. Runs that began with them resume with them, so they must never change."""
    assert rows_of_step(23, 12, 7, 5, 1).tolist() == [6, 19, 3, 10, 7, 15, 11, 1, 2, 12, 8]
    # rule 1, of the runs before: what NumPy 2.4's Generator.permutation gives
    assert rows_of_step(23, 12, 7, 5, 1, rule=1).tolist() == [10, 2, 15, 12, 22, 20, 14, 11, 7, 3, 21]


def test_an_epoch_is_ordered_once(monkeypatch):
    made = []
    bit_generator = np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **key: (made.append(key), bit_generator(**key))[1])
    rows = np.concatenate([rows_of_step(109, 10, 5, step) for step in range(22)])
    assert len(made) == 2
    rows[:] = -1  # the array belongs to the caller
    assert sorted(np.concatenate([rows_of_step(109, 10, 5, step) for step in range(11, 22)])) == list(range(109))


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
