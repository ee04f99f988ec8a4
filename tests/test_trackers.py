"""Trackers get what the JSONL gets, by the calls that the packages have."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from indraquantum.config import TrainSettings
from indraquantum.errors import UserError
from indraquantum.metrics import read_metrics
from indraquantum.trackers import WandbTracker, numbers, open_tracker, require_tracker
from indraquantum.training import loop


def settings(world, tmp_path, **changes) -> TrainSettings:
    return TrainSettings(
        data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", threads=1, d_model=6, layers=1, heads=2,
        mlp_width=10, batch_tokens=480, max_steps=3, no_teacher=True, **changes,
    )  # fmt: skip


def fake_package(name: str, calls: list) -> ModuleType:
    """The calls of wandb and trackio that are used here, with the names of their parameters."""
    package = ModuleType(name)

    def init(project=None, name=None, config=None, resume=None, **options):
        calls.append(("init", project, name, config["seed"], resume, options))

    def log(data, step=None):
        calls.append(("log", step, data))

    def finish(**options):
        calls.append(("finish", options))

    package.init, package.log, package.finish = init, log, finish
    package.__spec__ = object()
    return package


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_run_is_tracked_line_by_line(world, tmp_path, monkeypatch, kind):
    calls: list = []
    monkeypatch.setitem(sys.modules, kind, fake_package(kind, calls))
    report = loop.train(settings(world, tmp_path, log_to=kind))
    options = {"dir": str(tmp_path / "logs" / "run")} if kind == "wandb" else {}
    assert calls[0] == ("init", "indraquantum", "run", 0, "never", options)
    assert calls[-1] == ("finish", {})
    lines = read_metrics(report.metrics)
    assert [call[1] for call in calls[1:-1]] == [line["step"] for line in lines] == [0, 1, 2, 3]
    for call, line in zip(calls[1:-1], lines, strict=True):
        assert call[2].get("ce") == line["ce"]
        assert call[2].get("held_out/all") == (line["held_out"]["all"] if line["held_out"] else None)
    plain = loop.train(settings(world, tmp_path / "plain"))
    assert plain.held_out == report.held_out


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_after_a_kill_no_line_is_lost_and_none_is_there_twice(world, tmp_path, monkeypatch, kind):
    """Kill a run two steps after its checkpoint. What the tracker has by then stays a separate run, complete or not."""
    calls: list = []
    monkeypatch.setitem(sys.modules, kind, fake_package(kind, calls))
    run = settings(world, tmp_path, log_to=kind, save_every=1)
    loop.train(run)
    for path in (run.output / "checkpoint_v4_epoch_1.pt", *run.output.glob("checkpoint_v4_step_[23].pt")):
        path.unlink(missing_ok=True)
    assert [path.name for path in run.output.glob("*.pt")] == ["checkpoint_v4_step_1.pt"]
    calls.clear()
    report = loop.train(run)
    assert (calls[0][0], calls[0][4]) == ("init", "never")
    lines = read_metrics(report.metrics)
    assert [call[1] for call in calls[1:-1]] == [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [call[2]["tokens"] for call in calls[1:-1]] == [line["tokens"] for line in lines]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_that_does_not_start_is_one_line_and_the_run_goes_on_without_it(world, tmp_path, monkeypatch, kind):
    calls: list = []
    package = fake_package(kind, calls)
    monkeypatch.setattr(package, "init", lambda **options: {}["No API key\nconfigured"])
    monkeypatch.setitem(sys.modules, kind, package)
    with pytest.raises(
        UserError, match=rf"^--log-to: got {kind}; must be none or a tracker that can start here \(.*\)"
    ):
        loop.train(settings(world, tmp_path, log_to=kind))
    assert loop.train(settings(world, tmp_path)).steps == 3


class Broken(Exception):
    """Of a tracker."""


@pytest.mark.parametrize("call", ["log", "finish"])
@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_that_breaks_costs_the_run_nothing(world, tmp_path, monkeypatch, caplog, kind, call):
    calls: list = []
    package = fake_package(kind, calls)

    def breaks(*data, step=0, **options):
        if call == "finish" or step == 2:
            raise Broken("Connection lost\nfor good")

    monkeypatch.setattr(package, call, breaks)
    monkeypatch.setitem(sys.modules, kind, package)
    report = loop.train(settings(world, tmp_path, log_to=kind))
    assert [line["step"] for line in read_metrics(report.metrics)] == [0, 1, 2, 3]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        f"--log-to {kind}: the tracker failed and gets no more of this run (Connection lost for good); "
        "metrics.jsonl has everything"
    ]
    assert loop.train(settings(world, tmp_path / "plain")).held_out == report.held_out


def test_a_flush_that_fails_does_not_stop_a_checkpoint(world, tmp_path, monkeypatch):

    def fails(self):
        raise Broken("no space")

    monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", []))
    monkeypatch.setattr(WandbTracker, "flush", fails)
    assert loop.train(settings(world, tmp_path, log_to="wandb")).checkpoint.is_file()


@pytest.mark.parametrize(("kind", "options"), [("wandb", {"exit_code": 1}), ("trackio", {})])
def test_a_run_that_fails_is_not_a_finished_one(world, tmp_path, monkeypatch, kind, options):
    calls: list = []
    monkeypatch.setitem(sys.modules, kind, fake_package(kind, calls))

    def fails(run):
        raise UserError("steps", 1, "must not be")

    monkeypatch.setattr(loop, "take_step", fails)
    with pytest.raises(UserError, match="must not be"):
        loop.train(settings(world, tmp_path, log_to=kind))
    assert calls[-1] == ("finish", options)


@pytest.mark.parametrize("chosen", [{}, {"WANDB_PROJECT": "mine"}, {"WANDB_NAME": "a", "WANDB_DIR": "/b"}])
def test_environment_variables_of_wandb_are_left_to_it(world, tmp_path, monkeypatch, chosen):
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", calls))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    loop.train(settings(world, tmp_path, log_to="wandb"))
    _, project, name, _, _, options = calls[0]
    assert project == (None if "WANDB_PROJECT" in chosen else "indraquantum")
    assert name == (None if "WANDB_NAME" in chosen else "run")
    assert options == ({} if "WANDB_DIR" in chosen else {"dir": str(tmp_path / "logs" / "run")})


def test_only_numbers_are_tracked():
    metrics = {"step": 3, "ce": 1.5, "kd": None, "collapse": ["phase_rise"], "held_out": {"all": 2.5}, "on": True}
    assert numbers(metrics) == {"step": 3, "ce": 1.5, "held_out/all": 2.5}


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named it"), AttributeError("built for another")])
@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
def test_without_the_package_there_is_one_line_and_nothing_is_written(world, tmp_path, without_package, kind, error):
    without_package(kind, error)
    message = rf"--log-to: got {kind}; needs the package {kind}, .*{error}.*: pip install 'indraquantum\[{kind}\]'$"
    with pytest.raises(UserError, match=message):
        loop.train(settings(world, tmp_path, log_to=kind))
    assert list(tmp_path.iterdir()) == []
    require_tracker("none")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = open_tracker("tensorboard", tmp_path, {}, None)  # an earlier run of that name
    for step in (0, 1, 2, 3, 4):
        before.log({"step": step, "ce": 99.0})
    before.close()
    first = open_tracker("tensorboard", tmp_path, {}, None)
    for step in (1, 2, 3):
        first.log({"step": step, "ce": 10.0 - step, "held_out": {"all": 5.5} if step == 2 else None})
        first.flush()  # and then it is killed
    again = open_tracker("tensorboard", tmp_path, {}, 2)  # went on from step 2
    again.log({"step": 3, "ce": 1.25})
    again.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("ce")] == [(1, 9.0), (2, 8.0), (3, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("held_out/all")] == [(2, 5.5)]
