"""The curves that the monitor draws: bounded, with every extreme, and the same after a kill and a resume."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

import survival
from indraquantum.evaluation.collapse import CollapseFigures
from indraquantum.files import folder_lock
from indraquantum.metrics import FIELDS, MetricsLog, _line
from indraquantum.monitor import curves
from indraquantum.monitor.curves import DECAYS, SERIES, SMOOTHED, Curves, Follower
from indraquantum.monitor.overview import overview_of
from indraquantum.monitor.points import CAPACITY, Means, Points
from indraquantum.monitor.tail import TAIL_BYTES
from indraquantum.smoothing import smoothed
from indraquantum.training.guards import CollapseGuard


def line(step: int, **values) -> bytes:
    return _line(dict.fromkeys(FIELDS) | {"step": step, "tokens": 10 * step} | values)


def follow(path) -> Follower:
    follower = Follower(path)
    read(follower)
    return follower


def read(follower: Follower) -> None:
    follower.read(0)
    while follower.fraction < 1:
        follower.read(10)


def series(curves: Curves, name: str) -> np.ndarray:
    return curves.points.since(0)[1][:, SERIES.index(name)]


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 5000])
def test_every_extreme_survives_and_the_number_of_points_is_bounded(rows):
    draw = np.random.default_rng(rows)
    values = draw.normal(size=(rows, 3))
    values[draw.random(values.shape) < 0.3] = np.nan
    values[:, 2] = np.nan
    values[rows // 3 : rows // 3 + 1, 0], values[rows // 2 : rows // 2 + 1, 1] = 50, -50
    points, begin = Points(3), 0
    while begin < rows:  # in parts of any size
        end = begin + int(draw.integers(1, 700))
        points.add(np.arange(begin, min(end, rows), dtype=float), values[begin:end])
        begin = end
    steps, drawn = points.since(0)
    assert len(steps) <= 2 * CAPACITY + 2
    assert (np.diff(steps) >= 0).all()
    assert np.isnan(drawn[:, 2]).all()
    if rows:
        assert (steps[0], steps[-1]) == (0, rows - 1)
        for column in (0, 1):
            for extreme in (np.nanmin, np.nanmax):
                assert extreme(drawn[:, column]) == np.float32(extreme(values[:, column]))
    if rows < CAPACITY:
        assert np.array_equal(drawn, values.astype(np.float32), equal_nan=True)


def test_a_falling_curve_stays_falling_when_it_is_merged():
    points = Points(1)
    points.add(np.arange(4096.0), np.arange(4096.0, 0, -1)[:, None])
    assert points.every == 8
    assert (np.diff(points.since(0)[1][:, 0]) < 0).all()


def test_points_after_a_stretch_complete_those_before():
    points = Points(1)
    points.add(np.arange(3000.0), np.arange(3000.0)[:, None])
    steps, values = points.since(0)
    later_steps, later = points.since(100)
    assert np.array_equal(steps[200:], later_steps)
    assert np.array_equal(values[200:], later)


@pytest.mark.parametrize("decay", DECAYS)
def test_means_are_those_of_the_plain_loop(decay):
    draw = np.random.default_rng(1)
    values = draw.normal(size=(1500, 2))
    values[draw.random(1500) < 0.4, 1] = np.nan
    means, found = Means(decay, 2), []
    for part in np.split(values, [1, 2, 700, 700, 1300]):
        found.append(means.take(part))
    found = np.concatenate(found)
    for column in (0, 1):
        there = ~np.isnan(values[:, column])
        assert np.isnan(found[~there, column]).all()
        assert found[there, column] == pytest.approx(smoothed(values[there, column].tolist(), decay), rel=1e-9)


def test_a_growing_file_is_read_once_and_a_half_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(0) + line(1, loss=5.0) + line(2, loss=4.0)[:40])
    follower = follow(path)
    assert follower.curves.last["step"] == 1
    path.write_bytes(line(0) + line(1, loss=5.0) + line(2, loss=4.0) + line(3, loss=3.0))
    read(follower)
    assert series(follower.curves, "loss").tolist()[1:] == [5.0, 4.0, 3.0]
    assert (follower.generation, follower.curves.damaged) == (0, 0)


def test_smoothed_losses_and_thresholds_are_those_of_training(tmp_path):
    """The thresholds are checked against the guard itself: it suspects what is below the drawn threshold."""
    values = [0.1, 0.15, 2.0, 0.6, 0.4, 3.0, 0.7]
    (tmp_path / "m").write_bytes(
        b"".join(
            line(n, loss=v, context_divergence=v, held_out={"wiki": v, "all": 2 * v}) for n, v in enumerate(values)
        )
    )
    found = follow(tmp_path / "m").curves
    assert series(found, f"loss@{DECAYS[0]}") == pytest.approx(smoothed(values, DECAYS[0]), rel=1e-6)
    limits, guard = series(found, "context_divergence_threshold"), CollapseGuard()
    for value, limit in zip(values, limits, strict=True):
        guard.look(CollapseFigures(value, None, None, 1.0), [])
        assert ("context_divergence" in guard.found) == (not np.isnan(limit) and value < limit)
    assert np.isnan(limits[:2]).all()
    _, held_out = found.held_out.since(0)
    assert found.sources == ("wiki", "all")
    assert held_out[:, 1] == pytest.approx(np.array(values) * 2)
    assert len(SERIES) == len(set(SERIES))
    assert set(SMOOTHED) < set(FIELDS)


@pytest.mark.parametrize("lines_kept", [3, 900, 1050, 2499])
def test_after_a_resume_the_curves_are_those_of_the_new_file(tmp_path, lines_kept, monkeypatch):
    """A resumed run replaces the file. Reading continues at a mark before the first line that differs."""
    monkeypatch.setattr(curves, "LINES_BETWEEN_MARKS", 1000)
    path = tmp_path / "metrics.jsonl"
    lines = [line(n, loss=float(n % 7), ce=1.0) for n in range(2500)]
    path.write_bytes(b"".join(lines))
    follower = follow(path)
    content = b"".join([*lines[:lines_kept], *(line(n, loss=50.0) for n in range(lines_kept, lines_kept + 40))])
    (tmp_path / "new").write_bytes(content)
    os.replace(tmp_path / "new", path)
    taken, take = [], Curves.take
    monkeypatch.setattr(
        Curves, "take", lambda self, lines, shapes: taken.append(len(lines)) or take(self, lines, shapes)
    )
    read(follower)
    assert follower.generation == 1
    assert sum(taken) == lines_kept + 40 - (lines_kept // 1000) * 1000
    again = follow(path).curves
    for ours, theirs in zip(follower.curves.points.since(0), again.points.since(0), strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)
    assert follower.curves.last == again.last


DAMAGED = [
    b"{nothing\n", b"[]\n", b'{"step": "9"}\n', b'{"step": 1}\n', b'{"step": 7, "loss": "low"}\n',
    b'{"step": 7, "loss": true}\n', b'{"step": 7, "loss": NaN}\n', b'{"step": 7, "loss": 1' + b"0" * 400 + b"}\n",
    b'{"step": 7, "held_out": [1]}\n', b'{"step": 7, "held_out": {"all": "x"}}\n', b'{"step": 7, "collapse": 3}\n',
    b'{"step": 7, "collapse": [3]}\n', b"[" * 100_000 + b"\n", b"\xff\n", line(7, loss=2.5).replace(b"2.5", b"3.5"),
    b"\0" * (1 << 20),
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_left_out_and_told(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(5, loss=1.0) + content + (b"\n" if content[:1] == b"\0" else b"") + line(8, loss=2.0))
    found = follow(path).curves
    assert series(found, "loss").tolist() == [1.0, 2.0]
    assert found.damaged in (1, 2)
    assert found.damage.startswith("is damaged: its line 2 ")
    assert overview_of(path, tmp_path.parent).loss == 2.0


def test_collapse_is_told_where_it_begins_and_ends(tmp_path):
    found = [None, None, ["phase_rise"], ["phase_rise"], None]
    lines = [line(n, context_divergence=1.0 if n % 2 == 0 else None, collapse=found[n // 2]) for n in range(10)]
    (tmp_path / "m").write_bytes(b"".join(lines))
    assert follow(tmp_path / "m").curves.collapse == [(4, ["phase_rise"]), (8, [])]


def write(folder, lines, **record):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    (folder / "run.json").write_text(json.dumps({"settings": {"strategy": "stage1"}, "total_steps": 100, **record}))
    return folder / "metrics.jsonl"


def test_the_overview_by_hand(tmp_path):
    lines = [
        line(n, loss=9.0 - n, tokens_per_second=20.0, held_out={"all": 5.0} if n == 2 else None) for n in range(1, 6)
    ]
    path = write(tmp_path / "a" / "b", lines)
    found = overview_of(path, tmp_path)
    assert (found.name, found.state, found.strategy, found.steps, found.loss) == ("a/b", "stopped", "stage1", 5, 4.0)
    assert found.held_out == {"all": 5.0}
    assert found.seconds_left is None
    with folder_lock("--logs", path.parent):
        running = overview_of(path, tmp_path)
    assert (running.state, running.tokens_per_second) == ("running", 20.0)
    assert running.seconds_left == pytest.approx(95 * 10 / 20)  # 95 steps of 10 tokens
    assert overview_of(write(tmp_path / "c", lines, finished=True), tmp_path).state == "finished"


@pytest.mark.parametrize("before", [600, 3000])  # lines of 560 bytes after the evaluation; the tail has some 470
def test_the_overview_finds_an_evaluation_far_before_the_end(tmp_path, before):
    blank = dict.fromkeys(FIELDS)
    lines = [_line(blank | {"step": n, "held_out": {"all": 7.0 - n} if n < 3 else None}) for n in range(before)]
    path = write(tmp_path / "a", lines)
    assert path.stat().st_size > TAIL_BYTES
    assert overview_of(path, tmp_path).held_out == {"all": 5.0}
    half = _line(blank | {"step": before, "held_out": {"all": 1.0}})
    path.write_bytes(path.read_bytes() + half.replace(b"1.0", b"2.0") + half[:-9])  # one is damaged, one half-written
    assert overview_of(path, tmp_path).held_out == {"all": 5.0}
    none = write(tmp_path / "b", [line for line in lines if b'"held_out": {' not in line])
    assert overview_of(none, tmp_path).held_out == {}


def test_a_killed_run_has_died_and_one_that_ended_itself_was_stopped(tmp_path):
    path = write(tmp_path / "run", [line(1)])

    def killed():
        with folder_lock("--logs", path.parent):
            survival.die()

    assert survival.in_fork(killed) == -signal.SIGKILL
    assert overview_of(path, tmp_path).state == "died"
    with folder_lock("--logs", path.parent):
        assert overview_of(path, tmp_path).state == "running"
    assert overview_of(path, tmp_path).state == "stopped"
    with path.open("ab") as file:
        file.write(line(20, context_divergence=0.0, collapse=["context_divergence"]) + line(21))
    found = overview_of(path, tmp_path)
    assert (found.state, found.collapse) == ("collapsed", ["context_divergence"])


def test_a_damaged_run_json_is_told(tmp_path):
    path = write(tmp_path / "run", [line(1)])
    (path.parent / "run.json").write_text("[")
    found = overview_of(path, tmp_path)
    assert found.state == "damaged"
    assert "run.json" in found.problem


def test_a_log_of_training_is_followed_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 0, "tokens": 0})
    follower = follow(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log.write({"step": step, "tokens": step, "loss": 1.5})
    read(follower)
    log.close()
    assert follower.curves.last["step"] == 3
    MetricsLog(tmp_path / "metrics.jsonl", resumed_step=1).close()
    read(follower)
    assert (follower.curves.last["step"], follower.generation) == (1, 1)


@pytest.mark.parametrize("count", [1, curves.MOST_SOURCES - 1, curves.MOST_SOURCES, 200])
def test_the_loss_of_all_text_is_drawn_for_any_number_of_sources(tmp_path, count):
    named = {f"s{number}": float(number) for number in range(count)}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1, held_out=named | {"all": 0.5}) + line(2, held_out=named | {"all": 0.25}))
    found = follow(path).curves
    assert found.sources == (*list(named)[: curves.MOST_SOURCES - 1], "all")
    assert found.held_out.since(0)[1][:, -1].tolist() == [0.5, 0.25]
