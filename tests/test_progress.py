"""What long commands say: a line now and then where no bar is seen, with the figures that a reader needs."""

from __future__ import annotations

import io
import re
import sys

import pytest

from indraquantum import progress
from indraquantum.config import CaptureSettings, PrepareSettings, TeacherSettings, TrainSettings
from indraquantum.data.prepare import prepare
from indraquantum.progress import Progress
from indraquantum.teacher.capture import capture
from indraquantum.training.loop import figures_of, short_figures_of, train
from indraquantum.training.pretrain_teacher import pretrain_teacher


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_thirty_seconds_by_hand(clock, capsys):
    with Progress("copy", 5000, "files", done=1000) as bar:
        for seconds in (10, 29, 31, 40, 59, 62):
            clock[0] = 100.0 + seconds
            bar.update(100, "size 3")
    assert capsys.readouterr().out.splitlines() == [
        "copy: 1,300 of 5,000 files, size 3, 9.7 files/s, 6 min 22 s left",  # 300 in 31 s; 3,700 left
        "copy: 1,600 of 5,000 files, size 3, 9.7 files/s, 5 min 51 s left",  # 600 in 62 s; 3,400 left
    ]


def test_units_of_an_earlier_run_count_as_done_but_not_for_the_speed(clock, capsys):
    with Progress("capture", 5000, "tokens") as bar:
        bar.update(1000, before=1000)
        clock[0] += 40.0
        bar.update(600, before=200)
    assert capsys.readouterr().out == "capture: 1,600 of 5,000 tokens, 10 tokens/s, 5 min 40 s left\n"  # 400 in 40 s


def test_a_bar_counts_units_of_an_earlier_run_for_no_speed(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("capture", 5000, "tokens") as bar:
        bar._bar.start_t -= 40.0
        bar.update(1600, before=1200)
        bar._bar.refresh()
    rate = float(screen.getvalue().rsplit(", ", 1)[-1].split(" tokens/s")[0])
    assert 8.0 < rate <= 10.0  # 400 in 40 s and a little


def test_work_of_unknown_length(clock, capsys):
    with Progress("download", None, "bytes") as bar:
        clock[0] += 40.0
        bar.update(8000)
    assert capsys.readouterr().out == "download: 8,000 bytes, 200 bytes/s\n"


def test_a_bar_shows_the_short_figures_in_a_narrow_terminal(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    metrics = {
        "ce": 4.3184,
        "kd": 1.765,
        "phase": 0.09,
        "magnitude": None,
        "learning_rate": 5e-3,
        "tokens_per_second": 14820.4,
    }
    with Progress("train", 448, "steps", done=95) as bar:
        bar.update(1, figures_of(metrics), short_figures_of(metrics))
        bar._bar.refresh()
    shown = screen.getvalue().rstrip("\n").split("\r")[-1]
    assert shown.startswith("train:  21%|")
    assert shown.rstrip().endswith(" left, 14,820 tokens/s, lr 5.0e-03, ce 4.318, kd 1.765, phase 0.090")
    assert "| 96/448, " in shown
    assert len(shown[: shown.index("ce 4.318") + 8]) <= 80


def test_a_silent_one_and_a_quick_one_say_nothing(clock, capsys):
    with Progress("a", 3, "steps", silent=True) as bar:
        clock[0] += 100.0
        bar.update()
    with Progress("b", 3, "steps") as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_every_long_command_says_how_far_it_is(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    sizes = {"data": world.data, "layers": 1, "heads": 2, "batch_tokens": 1440}
    prepare(
        PrepareSettings(wikitext=str(world.wikitext), alpaca_samples=0, alpaca=str(world.alpaca),
                        tokenizer=str(world.tokenizer), output=tmp_path / "d.pkl")
    )  # fmt: skip
    pretrain_teacher(TeacherSettings(**sizes, output=tmp_path / "teacher", logs=tmp_path / "logs", width=8, steps=2))
    capture(CaptureSettings(data=world.data, teacher=str(world.teacher), output=tmp_path / "signals"))
    train(TrainSettings(**sizes, output=tmp_path / "run", logs=tmp_path, d_model=4, mlp_width=6, max_steps=3))
    said = capsys.readouterr().out
    speed, left = r"[\d,.]+ tokens/s", r"\d+ s left"
    figures = rf"ce \d\.\d+, .*learning rate \d\.\d+e-0\d, {speed}, [\d,.]+ steps/s, {left}\n"
    assert re.search(rf"^teacher: 1 of 2 steps, {figures}", said, re.MULTILINE)
    assert re.search(rf"^capture: [\d,]+ of [\d,]+ tokens, {speed}, {left}\n", said, re.MULTILINE)
    assert re.search(rf"^tokenize wikitext: 120 of 120 documents, [\d,]+ documents/s, {left}\n", said, re.MULTILINE)
    for step in (1, 2, 3):
        assert re.search(
            rf"^train: {step} of 3 steps, ce \d.\d+, kd \d.\d+, phase \d.\d+, magnitude \d.\d+, l", said, re.MULTILINE
        )
