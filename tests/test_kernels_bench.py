"""The benchmark's own arithmetic, and that every figure can be measured; no time is asserted."""

import json
import sys
import time

import pytest

from indraquantum.bench import (
    Figure,
    Shape,
    figures_json,
    figures_table,
    interleaved_seconds,
    objective_memory,
    objective_speed,
)

TINY = Shape(num_rows=31, width=7, vocabulary=211, kept=3)


def test_flops_are_three_products():
    assert Shape(2, 3, 5, 1).flops == 3 * (2 * 2 * 3 * 5)


@pytest.mark.parametrize(
    ("value", "goal", "is_upper_limit", "reached"),
    [(2.0, 2.6, False, False), (3.0, 2.6, False, True), (1.1, 1.05, True, False), (9.0, None, True, True)],
)
def test_goal(value, goal, is_upper_limit, reached):
    figure = Figure("speed", value, "x", goal, is_upper_limit, "")
    assert figure.is_reached == reached
    assert ("NO" in figures_table([figure])) == (not reached)
    assert json.loads(figures_json([figure]))["figures"][0]["is_reached"] == reached


def test_candidates_take_turns():
    order = []
    seconds = interleaved_seconds(
        {"quick": lambda: order.append("quick"), "slow": lambda: (order.append("slow"), time.sleep(0.02))}, 3
    )
    assert order == ["quick", "slow", "slow", "quick"] * 2  # so that neither always comes first
    assert seconds["slow"] > 0.02 > seconds["quick"]


def test_speed_figures():
    names = {figure.name for figure in objective_speed(TINY, repeats=1)}
    assert {"objective_share_of_matmul_rate", "speedup_over_plain", "distillation_cost"} <= names


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_sees_the_buffer_and_little_else():
    """256 rows of 32,000 logits are 31 MiB; full logits of these rows would be 62 MiB, twice and more."""
    (figure,) = objective_memory((512,), Shape(width=16, vocabulary=32_000, kept=3))
    assert 16 < figure.value < 50
