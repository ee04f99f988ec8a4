"""`indra train --minutes`: the number of steps that fit, and a run that resumes with what was chosen."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from indraquantum import cli
from indraquantum.config import LrTestSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.kernels.ways import Way, in_force
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.loop import train
from indraquantum.training.run import trial_run
from indraquantum.trials import budget
from indraquantum.trials.budget import (
    REACHED,
    evaluation_seconds,
    expected_loss,
    real_tokens_per_step,
    step_seconds,
    within_minutes,
)
from indraquantum.trials.dry_run import dry_run
from indraquantum.trials.lr_range import lr_range_test
from test_trials import MEASURED

SMALL = {"d_model": 8, "layers": 1, "heads": 1, "mlp_width": 16, "batch_tokens": 480, "no_teacher": True}


def settings(world, tmp_path, **changes):
    folders = {"data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs"}
    return TrainSettings(**{**folders, **SMALL, "minutes": 5, "threads": 1, **changes})


@pytest.fixture
def slow(monkeypatch):
    """A step takes 4 seconds, an evaluation 7, and all else no time."""
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(budget, "step_seconds", lambda run: 4.0)
    monkeypatch.setattr(budget, "evaluation_seconds", lambda run: 7.0)


@pytest.mark.parametrize(("minutes", "evaluate_every"), [(4, 10), (30, 10), (30, 200), (77, 33)])
def test_the_steps_fill_the_minutes(world, tmp_path, slow, minutes, evaluate_every):
    found = within_minutes(settings(world, tmp_path, minutes=minutes, evaluate_every=evaluate_every))
    plan = trial_run(found).plan
    assert plan.total_steps == found.max_steps
    evaluated = {0, found.max_steps, *range(0, found.max_steps + 1, evaluate_every)}
    evaluated |= {step for step in range(found.max_steps + 1) if plan.epoch_ends(step)}
    seconds = found.max_steps * 4 + len(evaluated) * 7
    assert minutes * 60 - 60 < seconds <= minutes * 60


@pytest.mark.parametrize("begins", ["from scratch", "from a checkpoint"])
def test_the_minutes_are_those_of_the_stages_that_are_left(world, tmp_path, slow, begins):
    """With --start-from, the first half of the strategy is left out."""
    start = {}
    if begins == "from a checkpoint":
        start = {"start_from": train(settings(world, tmp_path / "first", minutes=None, max_steps=1)).checkpoint}
    given = settings(world, tmp_path, minutes=30, strategy="stage2-v3-gentle", evaluate_every=10, **start)
    plan = trial_run(within_minutes(given)).plan
    assert [stage.spec.name for stage in plan.stages] == ["stage1", "stage2-v3"][len(start) :]
    evaluated = {0, plan.total_steps, *range(0, plan.total_steps + 1, 10)}
    evaluated |= {step for step in range(plan.total_steps + 1) if plan.epoch_ends(step)}
    assert 27 * 60 < plan.total_steps * 4 + len(evaluated) * 7 <= 30 * 60


def test_data_of_one_step_have_a_step_for_each_stage(world, tmp_path, slow, capsys):
    given = settings(world, tmp_path, strategy="stage2-v3-gentle", batch_tokens=10**6, minutes=30)
    plan = trial_run(within_minutes(given)).plan
    steps = [stage.steps for stage in plan.stages]
    assert min(steps) > 5
    assert abs(steps[0] - steps[1]) <= 1
    train = plan.stages[0].train
    size = f"{sum(steps)} steps of {train.num_rows * plan.dataset.row_length:,} tokens"
    assert f"30 minutes: {size}, {sum(steps) * train.num_tokens:,} in all" in capsys.readouterr().out


def test_padding_is_not_counted_as_tokens(world, tmp_path):
    padded = {"data": world.pickle, "tokenizer": str(world.tokenizer)}
    run = trial_run(settings(world, tmp_path, minutes=None, epochs=1, **padded))
    stage = run.plan.stages[0]
    rows = [rows for step in range(stage.steps) for rows in stage.rows_of(step)]
    seen = sum(int((stage.train.batch(np.array([row])).index >= 0).sum()) for row in rows)
    assert seen < 0.95 * len(rows) * stage.dataset.row_length
    assert stage.steps * real_tokens_per_step(stage) == pytest.approx(seen, rel=0.02)


def test_an_evaluation_takes_as_long_for_each_row_as_its_first_batches(world, tmp_path, monkeypatch):
    """A row takes a quarter of a second here, but half of one in the first batch, which warms the processor up."""
    run, clock, seen = trial_run(settings(world, tmp_path, minutes=None)), [0.0], []
    run.plan = replace(run.plan, dataset=replace(run.dataset, validation=run.dataset.train))  # many rows

    def losses_of(learner, table_VD, batch, device):
        assert not learner.training
        seen.append(len(batch.labels))
        clock[0] += seen[-1] * (0.25 if len(seen) > 1 else 0.5)

    monkeypatch.setattr(budget, "losses_of", losses_of)
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert evaluation_seconds(run) == 0.25 * run.dataset.validation.num_rows
    assert sum(seen) < run.dataset.validation.num_rows
    assert run.model.training


def test_the_way_of_the_timed_steps_does_not_outlast_them(world, tmp_path, monkeypatch):
    """What a program computes afterwards has the bits that it would have without --minutes."""
    monkeypatch.setattr("indraquantum.training.run.way_for", lambda device: Way("torch", 48, 300))
    seen, before = [], in_force()
    monkeypatch.setattr(budget, "step_seconds", lambda run: seen.append(in_force()) or 4.0)
    monkeypatch.setattr(budget, "evaluation_seconds", lambda run: 7.0)
    within_minutes(settings(world, tmp_path))
    assert (seen, in_force()) == ([Way("torch", 48, 300)], before)


def test_without_minutes_nothing_is_timed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "trial_run", None)
    given = settings(world, tmp_path, minutes=None)
    assert within_minutes(given) is given


def test_the_batch_is_small_unless_one_is_given(world, tmp_path, slow):
    alone = settings(world, tmp_path).model_dump(exclude={"batch_tokens"}, exclude_unset=True)
    assert within_minutes(TrainSettings(**alone)).batch_tokens == 2048
    assert within_minutes(settings(world, tmp_path)).batch_tokens == 480


def test_a_run_keeps_what_was_chosen(world, tmp_path, slow, monkeypatch, capsys):
    given = settings(world, tmp_path, minutes=3)
    report = train(within_minutes(given))
    record = json.loads((tmp_path / "logs" / "run" / "run.json").read_text())
    assert record["settings"]["minutes"] == 3
    assert record["settings"]["max_steps"] == report.steps == record["total_steps"]
    monkeypatch.setattr(budget, "step_seconds", lambda run: 1.0)  # the machine is quicker now
    again = within_minutes(given)
    assert (again.max_steps, again.batch_tokens) == (report.steps, 480)
    assert train(again).steps == report.steps
    with pytest.raises(UserError, match=r"--minutes: got 9.*must be 3"):
        within_minutes(settings(world, tmp_path, minutes=9))
    elsewhere = within_minutes(settings(world, tmp_path, minutes=9, output=tmp_path / "other"))
    assert elsewhere.max_steps > report.steps


def test_a_run_that_was_moved_keeps_what_was_chosen(world, tmp_path, slow, monkeypatch):
    given = settings(world, tmp_path, minutes=3)
    report = train(within_minutes(given))
    moved = given.model_copy(update={"output": shutil.move(given.output, tmp_path / "moved")})
    monkeypatch.setattr(budget, "step_seconds", lambda run: 1.0)
    again = within_minutes(moved)
    assert (again.max_steps, again.batch_tokens) == (report.steps, 480)
    assert train(again).steps == report.steps
    with pytest.raises(UserError, match=r"--batch-tokens: got 512; must be 480, as in the run that \S+moved holds"):
        within_minutes(moved.model_copy(update={"batch_tokens": 512}))


def test_the_minutes_are_compared_wherever_a_run_resumes(world, tmp_path, slow, capsys):
    given = settings(world, tmp_path, minutes=3)
    report = train(within_minutes(given))
    back = given.model_copy(update={"resume": str(report.checkpoint), "output": tmp_path / "new"})
    assert within_minutes(back).max_steps == report.steps
    elsewhere = given.model_copy(update={"logs": tmp_path / "elsewhere"})
    for other, which in ((back, r"of --resume \S+\.pt$"), (elsewhere, r"that \S+run holds, or give another --output")):
        with pytest.raises(UserError, match=rf"^--minutes: got 9\.0; must be 3\.0, as in the run {which}"):
            within_minutes(other.model_copy(update={"minutes": 9.0}))
    begun = load_checkpoint("", report.checkpoint)
    save_checkpoint(report.checkpoint, replace(begun, settings=begun.settings | {"minutes": None}))
    with pytest.raises(UserError, match=r"^--minutes: got 3\.0; must be left out, as in the run of --resume "):
        within_minutes(back)
    del begun.settings["minutes"]  # an earlier version wrote it
    save_checkpoint(report.checkpoint, begun)
    capsys.readouterr()
    assert within_minutes(back).max_steps == report.steps
    assert "--minutes 3 changes nothing: the run that resumes keeps its number of steps." in capsys.readouterr().out


def test_several_processes_would_choose_different_lengths(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^--minutes: got 5\.0; must be left out with several processes.*--max-steps"):
        within_minutes(settings(world, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_the_cost_of_these_minutes(world, tmp_path, slow, capsys):
    given = settings(world, tmp_path, minutes=4)
    assert dry_run(given).total_steps == within_minutes(given).max_steps
    with pytest.raises(UserError, match=r"--epochs: got 2; must be left out with --minutes"):
        dry_run(settings(world, tmp_path, minutes=4, epochs=2))
    assert not list(tmp_path.iterdir())


def test_a_range_test_has_no_minutes():
    with pytest.raises(UserError, match=r"--minutes: got 5; must be left out"):
        lr_range_test(LrTestSettings(minutes=5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 7}, "--max-steps: got 7; must be left out with --minutes"),
        ({"epochs": 2}, "--epochs: got 2; must be left out with --minutes"),
        ({"resume": "never", "output": "DONE"}, "--resume: got never; must be auto, because "),
        ({"minutes": 0.5}, "--minutes: got 0.5; must be at least 3 here, where a step takes 4 s"),
        ({"strategy": "lengths.yaml"}, "--minutes: got 5.0; must be left out with --strategy lengths.yaml"),
    ],
)
def test_what_is_refused(world, tmp_path, slow, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths.yaml").write_text("stages: [{name: one, steps: 3}]")
    if "output" in options:
        done = train(settings(world, tmp_path / "done", minutes=None, max_steps=1))
        options |= {"output": done.checkpoint.parent}
    with pytest.raises(UserError) as refused:
        within_minutes(settings(world, tmp_path, **options))
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_command_times_real_steps(world, tmp_path, monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000))
    monkeypatch.setattr(budget, "SECONDS", 0.0)
    timed = []
    monkeypatch.setattr(budget, "step_seconds", lambda run: timed.append(step_seconds(run)) or 5.0)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if value is not True]
    places = [f"--data={world.data}", f"--output={tmp_path / 'run'}", f"--logs={tmp_path / 'logs'}"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--no-teacher", "--minutes=2", *words, *places])
    assert ended.value.code == 0
    assert timed[0] > 0
    assert "2 minutes: 2" in capsys.readouterr().out


def test_the_expected_loss_meets_the_measured_ones(world, tmp_path):
    class Known:
        settings = TrainSettings(**MEASURED, seed=7, max_steps=99)

        class model:
            class config:
                vocab_size = 32_000

    for tokens, loss in REACHED:
        assert expected_loss(Known, tokens) == pytest.approx(loss)
    for (fewer, before), (more, after) in itertools.pairwise(REACHED):
        assert expected_loss(Known, (fewer * more) ** 0.5) == pytest.approx((before + after) / 2)
    fewest, most = REACHED[0][0], REACHED[-1][0]
    assert expected_loss(Known, 0.6 * fewest) > REACHED[0][1]
    assert expected_loss(Known, 1.4 * most) < REACHED[-1][1]
    assert expected_loss(Known, 0.4 * fewest) is None
    assert expected_loss(Known, 1.6 * most) is None
    for other in (
        {"d_model": 64}, {"state_width": 64}, {"no_teacher": False}, {"batch_tokens": 4096}, {"head": "born"},
        {"phase_spread": 3.0}, {"strategy": "stage1"}, {"dropout": 0.5}, {"table_rate": 1000.0},
        {"schedule": "constant"}, {"start_from": "other.pt"}, {"residual": False}, {"d_model": 128}, {"mlp_width": 512},
    ):  # fmt: skip
        Known.settings = TrainSettings(**MEASURED | other)
        assert expected_loss(Known, 820_000) is None
    assert expected_loss(trial_run(settings(world, tmp_path, minutes=None)), 820_000) is None
