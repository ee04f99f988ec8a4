"""Student's t against printed tables, intervals and paired differences by hand."""

from __future__ import annotations

import math

import pytest

from indraquantum.ablation.intervals import Interval, interval, paired, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),  # from the tables of statistics books
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 4, 2.7764), (0.975, 9, 2.2622),
        (0.975, 30, 2.0423), (0.975, 1000, 1.9623), (0.95, 5, 2.0150), (0.9, 3, 1.6377), (0.995, 4, 4.6041),
        (0.9995, 1, 636.619),
    ],
)  # fmt: skip
def test_quantiles_of_the_tables(probability, degrees, quantile):
    assert t_quantile(probability, degrees) == pytest.approx(quantile, abs=6e-5, rel=1e-6)


def test_quantiles_in_closed_form():
    assert t_quantile(0.8, 1) == pytest.approx(math.tan(0.3 * math.pi), rel=1e-12)  # Cauchy's law
    p = 0.93
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12)


def test_an_interval_by_hand():
    # Mean 4, squares 9 + 1 + 0 + 4 + 4 = 18 over 4 degrees: standard error sqrt(4.5 / 5), t 2.776445.
    found = interval([1.0, 3.0, 4.0, 6.0, 6.0])
    assert found.mean == 4
    assert found.count == 5
    assert found.half_width == pytest.approx(2.7764451 * math.sqrt(0.9), rel=1e-6)
    assert found.clear_of_zero()


def test_one_seed_has_no_interval():
    assert interval([2.5]) == Interval(2.5, None, 1)
    assert not interval([2.5]).clear_of_zero()


def test_clear_of_zero_on_either_side_only():
    assert Interval(-0.2, 0.1, 3).clear_of_zero()
    assert not Interval(-0.1, 0.2, 3).clear_of_zero()


def test_pairs_are_taken_at_equal_seeds():
    assert paired({3: 1.0, 0: 5.0, 1: 2.0}, {0: 4.0, 3: 3.0, 7: 1.0}) == {0: 1.0, 3: -2.0}
