"""The benchmark's own arithmetic, and that every figure can be measured; no time is asserted."""

import json
import resource
import sys
import time
from types import SimpleNamespace

import pytest

from indraquantum import memory
from indraquantum.trials.bench import (
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
    [
        (2.0, 2.6, False, False),
        (3.0, 2.6, False, True),
        (1.1, 1.05, True, False),
        (9.0, None, True, True),
        (None, 2.6, False, None),
        (None, None, False, True),
    ],
)
def test_goal(value, goal, is_upper_limit, reached):
    figure = Figure("speed", value, "x", goal, is_upper_limit, "")
    assert figure.is_reached == reached
    assert ("NO" in figures_table([figure])) == (reached is False)
    assert ("unknown" in figures_table([figure])) == (value is None)
    assert json.loads(figures_json([figure]))["figures"][0]["is_reached"] == reached


def test_candidates_take_turns(monkeypatch):
    order, now = [], 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def taking(name, seconds):
        nonlocal now
        order.append(name)
        now += seconds

    work = {"quick": lambda: taking("quick", 1.0), "slow": lambda: taking("slow", len(order))}
    seconds = interleaved_seconds(work, 3)
    assert order == ["quick", "slow", "slow", "quick"] * 2  # so that neither always comes first
    assert seconds == {"quick": 1.0, "slow": 5.0}  # the median of 2, 5 and 6: as many calls come before


def test_speed_figures():
    names = {figure.name for figure in objective_speed(TINY, repeats=1)}
    assert {"objective_share_of_matmul_rate", "speedup_over_plain", "distillation_cost"} <= names


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_sees_the_buffer_and_little_else():
    """256 rows of 32,000 logits are 31 MiB; full logits of these rows would be 62 MiB, twice and more."""
    (figure,) = objective_memory((512,), Shape(width=16, vocabulary=32_000, kept=3))
    assert 16 < figure.value < 50


WITHOUT_PROC = """
import io
def reach(path, *_, original=io.open, **options):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(path)
    return original(path, *_, **options)
io.open = reach
"""


def test_without_proc_memory_is_unknown_and_everything_else_is_measured(capfd, tmp_path, monkeypatch):
    """As on a system that has no /proc: here in the processes that `indra bench` starts."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_PROC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (figure,) = objective_memory((31,), TINY)
    assert (figure.value, figure.is_reached) == (None, None)
    assert capfd.readouterr() == ("", "")
    assert json.loads(figures_json([figure]))["figures"][0]["value"] is None


def test_a_process_that_measures_and_dies_leaves_its_figure_unknown(capfd):
    (figure,) = objective_memory((31,), Shape(width=-1))
    assert figure.value is None
    said = capfd.readouterr().err
    assert "warning: python -m indraquantum.trials.bench ended with status 1; its memory is unknown" in said


@pytest.mark.parametrize(("platform", "peak"), [("linux", None), ("darwin", 12345)])
def test_the_peak_without_proc(tmp_path, monkeypatch, platform, peak):
    """macOS counts bytes since the start; on Linux the count may be that of the process which started this one."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=12345))
    assert (memory.held_bytes(), memory.peak_bytes(), memory.restart_peak()) == (None, peak, False)


def test_memory_of_this_process_is_what_the_system_counts(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    3000 kB\nVmRSS:\t    2000 kB\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert (memory.held_bytes(), memory.peak_bytes()) == (2000 * 1024, 3000 * 1024)
    (tmp_path / "status").write_text("Name:\tpython\n")  # some containers count nothing
    assert (memory.held_bytes(), memory.peak_bytes()) == (None, None)
