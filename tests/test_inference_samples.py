"""Distinct words and repetitions, counted by hand."""

from __future__ import annotations

import math

import pytest

from indraquantum.inference.samples import sample_figures


def test_figures_by_hand():
    found = sample_figures(["a b a b a b", "a c\nd"])
    assert found.words == 4.5
    assert found.distinct_1 == pytest.approx(4 / 9)  # a b c d
    assert found.distinct_2 == pytest.approx(4 / 7)  # ab ba ac cd, of 5 + 2
    assert found.repetition_4 == pytest.approx(1 / 3)  # abab baba abab


def test_what_stood_in_another_text_is_no_repetition():
    assert sample_figures(["a b c d", "a b c d"]).repetition_4 == 0


def test_nothing_written_has_no_figures():
    found = sample_figures(["", ""])
    assert found.words == 0
    assert all(map(math.isnan, (found.distinct_1, found.distinct_2, found.repetition_4)))
