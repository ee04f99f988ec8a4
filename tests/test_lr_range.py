"""`indra lr-test`: the rates rise as they should, the suggestion is where the loss falls, only a picture stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from indraquantum import cli
from indraquantum.config import LrTestSettings
from indraquantum.errors import OutOfMemory, TrainingStopped
from indraquantum.smoothing import smoothed
from indraquantum.training.engine import Engine
from indraquantum.training.run import trial_run
from indraquantum.trials import lr_range
from indraquantum.trials.lr_range import lr_range_test, rising_rates, suggested_rate


def settings(world, tmp_path, **changes) -> LrTestSettings:
    common = {
        "data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs", "picture": tmp_path / "found.png",
        "threads": 1, "d_model": 6, "layers": 1, "heads": 2, "mlp_width": 10, "batch_tokens": 480, "steps": 40,
    }  # fmt: skip
    return LrTestSettings(**{**common, **changes})


def test_rates_rise_by_equal_ratios():
    assert rising_rates(1e-4, 1.0, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_the_suggestion_is_the_middle_of_the_fall():
    rates = rising_rates(1e-5, 1.0, 101)
    # a sigmoid whose steepest place is 1e-3, and a rise from 0.1 on that is steeper than the fall
    losses = [6 - 2 / (1 + (1e-3 / rate) ** 2) + 40 * max(0.0, math.log10(rate / 0.1)) for rate in rates]
    assert suggested_rate(rates, losses) == pytest.approx(1e-3, rel=0.15)
    assert suggested_rate(rates, [5 + rate for rate in rates]) is None
    assert suggested_rate([], []) is None


def test_smoothing_by_hand():
    assert smoothed([5.0, 5.0, 5.0], 0.8) == pytest.approx([5.0, 5.0, 5.0])
    assert smoothed([2.0, 8.0, 1.0], 0.5) == pytest.approx([2.0, (2 + 2 * 8) / 3, (2 + 2 * 8 + 4 * 1) / 7])
    assert smoothed([2.0, 8.0], 0.0) == [2.0, 8.0]


def test_a_long_range_test_takes_its_mean_once_a_step(monkeypatch, world, tmp_path):
    run, taken = trial_run(settings(world, tmp_path, no_teacher=True)), []
    take = lr_range.Smoothing.take
    monkeypatch.setattr(lr_range.Smoothing, "take", lambda mean, value: (taken.append(value), take(mean, value))[1])
    monkeypatch.setattr(lr_range, "_loss_of", lambda _, step: 5 - step.learning_rate)
    found = lr_range.climb(run, rising_rates(1e-5, 1.0, 300))
    assert len(taken) == 3 * len(found.losses)  # one that may end the test, and the mean both ways


@pytest.mark.parametrize("steps", [30, 100])
@pytest.mark.parametrize("width", [0.4, 0.8, 1.6])
def test_the_suggestion_does_not_lag_behind_the_fall(monkeypatch, world, tmp_path, steps, width):
    run = trial_run(settings(world, tmp_path, no_teacher=True))
    rates = rising_rates(1e-5, 1e-1, steps)

    def falling(_, step):
        return 6 - 2 * (1 + math.erf(math.log(step.learning_rate / 1e-3) / width)) / 2  # most steeply at 1e-3

    monkeypatch.setattr(lr_range, "_loss_of", falling)
    found = lr_range.climb(run, rates)
    assert abs(math.log(found.suggested / 1e-3)) <= 1.01 * math.log(rates[1] / rates[0])


def test_losses_that_explode_leave_the_mean_of_the_others_alone():
    losses = [6.0 - step / 10 for step in range(20)]
    usual, exploded = (lr_range.smoothed_both_ways([*losses, end]) for end in (9.0, 1e12))
    assert exploded == usual


def test_a_test_leaves_a_picture_and_nothing_else(world, tmp_path, capsys):
    wanted = settings(world, tmp_path)
    found = lr_range_test(wanted)
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]
    assert wanted.picture.read_bytes().startswith(b"\x89PNG")
    assert found.rates == rising_rates(1e-5, 1.0, 40)[: len(found.rates)]
    assert found.suggested in found.rates
    assert f"Suggested: --learning-rate {found.suggested:.1e}" in out
    at = found.rates.index(found.suggested)
    assert found.smoothed[at] < found.smoothed[0]
    assert min(found.smoothed) < found.smoothed[0] - 0.3


def test_each_group_keeps_its_multiple_and_updates_follow_the_rate(world, tmp_path):
    moved = {}
    for rate in (1e-4, 1e-2):
        run = trial_run(settings(world, tmp_path, table_rate=7.0))
        before = run.model.embedding.weight.detach().clone()
        lr_range.climb(run, [rate])
        assert {g["name"]: g["lr"] for g in run.optimizer.param_groups}["table"] == pytest.approx(7 * rate)
        step = lr_range.step_at(run, 1, rate)
        assert (step.kd_weight, step.phase_weight, step.magnitude_weight) == (0.01, 0.1, 0.1)
        moved[rate] = (run.model.embedding.weight.detach() - before).norm().item()
    assert moved[1e-2] == pytest.approx(100 * moved[1e-4], rel=1e-3)


def test_rows_and_weights_are_those_of_the_first_stage(monkeypatch, world, tmp_path):
    run = trial_run(settings(world, tmp_path, strategy="stage2-v3-gentle"))
    do, seen = run.engine.step, []

    def watched(step):
        sources = set(step.split.batch(step.rows).sources.flat) - {-1}
        seen.append((sources, step.signals, step.kd_weight, step.phase_weight))
        return do(step)

    monkeypatch.setattr(run.engine, "step", watched)
    lr_range.climb(run, rising_rates(1e-5, 1e-4, 3))
    wikitext = run.dataset.source_names.index("wikitext")
    assert seen == [({wikitext}, None, 0.0, 0.0)] * 3


def test_the_tables_rate_is_that_of_the_stage(world, tmp_path):
    (tmp_path / "my.yaml").write_text("stages: [{name: a, fraction: 1.0, table_rate: 3.0}]")
    run = trial_run(settings(world, tmp_path, strategy=str(tmp_path / "my.yaml")))
    lr_range.climb(run, [1e-4])
    assert {g["name"]: g["lr"] for g in run.optimizer.param_groups}["table"] == pytest.approx(3e-4)


@pytest.mark.parametrize("end", ["rises", "is not finite"])
def test_it_ends_where_the_loss(monkeypatch, world, tmp_path, end):
    run = trial_run(settings(world, tmp_path, no_teacher=True))

    def loss_of(_, step):
        rate = step.learning_rate
        if rate > 5e-3 and end == "is not finite":
            raise TrainingStopped("loss nan")
        return 6.0 - 2 * np.log10(rate / 1e-5) / 3 if rate <= 5e-3 else 60.0

    monkeypatch.setattr(lr_range, "_loss_of", loss_of)
    found = lr_range.climb(run, rising_rates(1e-5, 1.0, 40))
    assert len(found.rates) == (23 if end == "rises" else 22)
    assert found.suggested <= 5e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--picture=x.txt"], "--picture: got x.txt; must end in .png, .pdf, .svg"),
        (["--lowest-rate=0.1", "--highest-rate=0.01"], "--highest-rate: got 0.01; must be above --lowest-rate 0.1"),
        (["--picture=folder.png"], "--picture: got folder.png; must be a file, not a folder"),
        (["--dry-run"], "--dry-run: got True; must be left out, because a range"),
        (["--steps=3"], "--steps: got 3"),
    ],
)
def test_what_is_wrong_is_one_line(world, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["lr-test", f"--data={world.data}", *words])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert said in error
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.png"]


def test_a_step_that_does_not_fit_into_memory_is_one_line(world, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Engine, "step", full)
    with pytest.raises(OutOfMemory, match=r"^--micro-batch-tokens: got \d+; must be smaller"):
        lr_range_test(settings(world, tmp_path))
