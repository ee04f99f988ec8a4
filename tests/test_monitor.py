"""The monitor reads the metrics file and nothing else; its pictures show what the file says."""

from __future__ import annotations

import errno
import os

import pytest
from matplotlib.figure import Figure

from indraquantum.errors import UserError
from indraquantum.metrics import FIELDS, Line, _line
from indraquantum.monitor import plots
from indraquantum.monitor.curves import Curves
from indraquantum.monitor.runs import find_runs, metrics_files


def line(step: int, **values) -> dict:
    return {name: values.get(name) for name in FIELDS} | {"step": step}


def curves_of(metrics: list[dict]) -> Curves:
    """The curves of a file with these metrics."""
    curves = Curves()
    curves.take([Line(None, number, _line(found)) for number, found in enumerate(metrics, start=1)], set())
    assert curves.damaged == 0
    return curves


METRICS = [
    line(0, held_out={"wikitext": 7.0, "all": 7.5}),
    line(1, loss=5.0, ce=4.0, kd=3.0, phase=1.0, magnitude=0.5, phase_mean=1.0, phase_std=0.25, magnitude_mean=0.5,
         magnitude_std=0.125),
    line(2, loss=4.0, ce=3.0, kd=2.0, phase=0.5, magnitude=0.25, phase_mean=2.0, phase_std=0.5, magnitude_mean=0.75,
         magnitude_std=0.25, held_out={"wikitext": 6.0, "all": 6.5}),
]  # fmt: skip


def drawn(draw, metrics=METRICS) -> dict[str, list[tuple[float, float]]]:
    """Points of each labelled line that `draw` drew."""
    axes = Figure().subplots()
    draw(axes, curves_of(metrics))
    return {item.get_label(): item.get_xydata().tolist() for item in axes.lines if not item.get_label().startswith("_")}


def test_total_loss_shows_smoothed_loss_and_held_out_points():
    lines = drawn(plots.draw_total_loss)
    assert lines["total loss"] == [[1, 5.0], [2, pytest.approx((0.9 * 5 + 4) / 1.9)]]
    assert lines["held-out CE, all"] == [[0, 7.5], [2, 6.5]]


def test_stability_shows_mean_and_band():
    axes = Figure().subplots()
    plots.draw_stability(axes, curves_of(METRICS))
    assert [item.get_label() for item in axes.lines] == ["magnitude", "phase (radians)"]
    assert axes.lines[1].get_ydata().tolist() == [1.0, 2.0]
    band = axes.collections[1].get_paths()[0].vertices
    assert {0.75, 1.25, 1.5, 2.5} <= set(band[:, 1])


def test_a_run_without_distillation_draws_no_empty_curves():
    without = [line(1, loss=3.0, ce=3.0), line(2, loss=2.0, ce=2.0)]
    assert set(drawn(plots.draw_ce_and_kd, without)) == {"CE (text)"}
    assert drawn(plots.draw_alignment, without) == {}


def test_several_runs_are_drawn_over_each_other():
    axes = Figure().subplots()
    runs = {"one": curves_of(METRICS), "empty": curves_of([]), "begun": curves_of(METRICS[:1])}
    plots.draw_runs(axes, runs, "loss", "Total loss", "nats")
    labels = [item.get_label() for item in axes.lines if not item.get_label().startswith("_")]
    assert labels == ["one", "held-out CE, one", "held-out CE, begun"]


@pytest.mark.parametrize(
    ("draw", "step_0", "one_step"),
    [
        (plots.draw_total_loss, {"held-out CE, wikitext", "held-out CE, all"}, {"total loss"}),
        (plots.draw_ce_and_kd, set(), {"CE (text)", "KD (against the signals)"}),
        (plots.draw_alignment, set(), {"phase term (circular distance)", "magnitude term (squared error)"}),
        (plots.draw_stability, set(), {"magnitude", "phase (radians)"}),
    ],
)
def test_a_run_with_hardly_a_line_is_drawn_as_far_as_it_goes(draw, step_0, one_step):
    assert drawn(draw, []) == {}
    assert drawn(draw, METRICS[:1]).keys() == step_0
    assert drawn(draw, METRICS[1:2]).keys() == one_step


def test_the_overview_is_a_picture(tmp_path):
    plots.save_overview(tmp_path / "run.png", curves_of(METRICS), "title")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_run_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("INDRA_METRICS", raising=False)
    for age, name in enumerate(("new", "old")):
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("{}\n")
        os.utime(folder / "metrics.jsonl", (1_000_000 - age, 1_000_000 - age))
    assert find_runs(tmp_path / "nowhere", tmp_path / "logs")[0].parent.name == "new"
    (tmp_path / "logs" / "begun").mkdir()
    (tmp_path / "logs" / "begun" / "metrics.jsonl").write_text("")  # a run that has not done a step
    assert find_runs(tmp_path / "logs")[0].parent.name == "new"
    monkeypatch.setenv("INDRA_METRICS", str(tmp_path / "logs" / "old" / "metrics.jsonl"))
    assert find_runs(tmp_path / "logs")[0].parent.name == "old"
    both = [tmp_path / "logs" / name / "metrics.jsonl" for name in ("old", "new")]
    monkeypatch.setenv("INDRA_METRICS", os.pathsep.join(map(str, both)))
    assert find_runs(tmp_path) == both
    for empty in ("gone", "logs/begun/metrics.jsonl"):
        monkeypatch.setenv("INDRA_METRICS", str(tmp_path / empty))
        with pytest.raises(UserError, match=r"must be the metrics\.jsonl of a run with at least one step"):
            find_runs(tmp_path)


def test_no_run_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("INDRA_METRICS", raising=False)
    with pytest.raises(UserError, match="train first"):
        find_runs(tmp_path)


def test_a_folder_that_can_not_be_read_hides_no_other_run(tmp_path, monkeypatch):
    for name in ("gone", "there"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "metrics.jsonl").write_text("{}\n")
    scandir = os.scandir

    def failing(path="."):
        if os.path.basename(path) == "gone":
            raise OSError(errno.ESTALE, "Stale file handle", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert metrics_files(tmp_path / "logs") == [tmp_path / "logs" / "there" / "metrics.jsonl"]
    with pytest.raises(OSError, match="Stale"):  # the folder that was asked for
        metrics_files(tmp_path / "logs" / "gone")
    assert metrics_files(tmp_path / "nowhere") == metrics_files(tmp_path / "logs" / "there" / "metrics.jsonl") == []
