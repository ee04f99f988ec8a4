"""A run that is killed, stopped or resumed anywhere ends with the bits of the run that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
import torch

import survival
from indraquantum import files
from indraquantum.errors import UserError
from indraquantum.files import read_json
from indraquantum.metrics import MetricsLog, read_metrics
from indraquantum.training import checkpoint, loop, plan
from indraquantum.training.checkpoint import checkpoint_path, load_checkpoint, step_checkpoint_path
from indraquantum.training.engine import Engine


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The uninterrupted run, and every checkpoint that a run saving at each step leaves on its way."""
    folder = tmp_path_factory.mktemp("whole")
    settings = survival.small_run(world, folder, save_every=1, keep_last=1000)
    assert survival.in_fork(lambda: survival.train_small(settings)) == 0
    return settings, survival.result(settings)


def last_step(whole) -> int:
    return whole[1][1][-1]["step"]


def end_of(settings):
    """The result after the same command once more, which must end well."""
    assert survival.in_fork(lambda: survival.train_small(settings)) == 0
    leftovers = [p.name for folder in (settings.output, settings.logs) for p in folder.rglob("*tmp*")]
    assert leftovers == []
    return survival.result(settings)


def half_written(write):
    """A write that dies when half of its bytes are on disk."""

    def wrapped(path, content, *arguments, **options):
        write(path, content[: len(content) // 2], *arguments, **options)
        survival.die()

    return wrapped


# Where a run may die: the loop, the metrics, and each step of a checkpoint's commit; and on which side of it the quick
# tests strike. The slow ones strike on both.
POINTS = [
    pytest.param(owner, name, when, marks=() if when in quick else pytest.mark.slow)
    for owner, name, quick in (
        (loop, "start_run", ["before"]), (loop, "resume", []), (loop, "take_step", ["after"]),
        (plan, "rows_of_step", []), (loop, "evaluate", ["before", "after"]), (Engine, "step", []),
        (torch.Tensor, "backward", ["after"]), (torch.nn.utils, "clip_grads_with_norm_", []),
        (torch.optim.AdamW, "step", []), (MetricsLog, "write", ["after"]), (MetricsLog, "sync", ["before", "after"]),
        (loop, "save", ["after"]), (loop, "save_checkpoint", ["after"]), (torch, "save", []),
        (checkpoint.Path, "write_bytes", ["before", "after"]), (checkpoint.Path, "write_text", ["before", "after"]),
        (os, "fsync", ["before", "after"]), (os, "replace", ["before", "after"]),
        (files, "fsync_folder", ["before", "after"]), (checkpoint.Path, "unlink", ["before", "after"]),
        (loop, "prune_step_checkpoints", ["after"]),
    )
    for when in ("before", "after")
]  # fmt: skip
# The third time: in the middle of the run, after a checkpoint has been committed.
OCCURRENCES = [pytest.param(3, id="third"), *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5, 8))]


@pytest.mark.parametrize("occurrence", OCCURRENCES)
@pytest.mark.parametrize(("owner", "name", "when"), POINTS, ids=lambda value: getattr(value, "__name__", value))
def test_kill_9_at_any_point(world, whole, tmp_path, owner, name, when, occurrence):
    settings = survival.small_run(world, tmp_path)
    if name in ("start_run", "resume"):
        occurrence = 1  # they come once

    def killed():
        survival.at(owner, name, when, occurrence, survival.die)
        survival.train_small(settings)

    status = survival.in_fork(killed)
    assert status == -signal.SIGKILL or occurrence > 3  # not every point is passed eight times
    committed = [read_json("", path)["step"] for path in settings.output.glob("*.json")]
    steps = tmp_path / "steps"

    def again():
        survival.at_every(loop, "take_step", lambda run: steps.open("a").write(f"{run.step}\n"))
        survival.train_small(settings)

    assert survival.in_fork(again) == 0
    if steps.exists():
        assert int(steps.read_text().split()[0]) >= max(committed, default=0)  # nothing that was committed is lost
    assert survival.result(settings) == whole[1]


@pytest.mark.parametrize("name", ["write_bytes", "write_text"])
def test_kill_9_in_the_middle_of_a_write(world, whole, tmp_path, name):
    settings = survival.small_run(world, tmp_path)

    def killed():
        write = getattr(checkpoint.Path, name)
        survival.at(loop, "save", "before", 2, lambda: setattr(checkpoint.Path, name, half_written(write)))
        survival.train_small(settings)

    assert survival.in_fork(killed) == -signal.SIGKILL
    assert end_of(settings) == whole[1]


def wait_for_steps(metrics, count, pid):
    """Until `metrics` has grown `count` times, or the process has ended."""
    size, grown = 0, -1  # a resumed run cuts it first, or finds it unchanged
    while grown < count and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = metrics.stat().st_size if metrics.exists() else 0
        grown, size = grown + (now > size), now
        time.sleep(0.001)


@pytest.mark.slow
def test_kill_9_at_100_random_times(world, whole, tmp_path):
    settings = survival.small_run(world, tmp_path, epochs=120)
    untouched = survival.small_run(world, tmp_path / "untouched", epochs=120)
    assert survival.in_fork(lambda: survival.train_small(untouched)) == 0
    draw, kills = random.Random(0), 0
    for _ in range(100):
        pid = survival.fork(lambda: survival.train_small(settings))
        wait_for_steps(settings.logs / "run" / "metrics.jsonl", draw.randint(0, 9), pid)
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert kills == 100
    assert checkpoint.newest_checkpoint(settings.output, lambda epoch: epoch * 6).checkpoint.step > 10
    assert end_of(settings) == survival.result(untouched)


def test_resume_from_every_step_is_exact(world, whole, tmp_path):
    settings, expected = whole
    for step in range(1, last_step(whole)):
        again = survival.small_run(world, tmp_path / str(step))
        again.output.mkdir(parents=True)
        shutil.copytree(settings.logs, again.logs)
        source = step_checkpoint_path(settings.output, step)
        source = source if source.exists() else checkpoint_path(settings.output, 1)
        for path in (source, checkpoint.manifest_path(source)):
            shutil.copy(path, again.output)
        assert end_of(again) == expected, step


def test_a_chain_of_five_resumes_is_exact(world, whole, tmp_path):
    settings = survival.small_run(world, tmp_path)

    def killed():
        survival.at(loop, "take_step", "after", 3, survival.die)
        survival.train_small(settings)

    for _ in range(5):
        assert survival.in_fork(killed) == -signal.SIGKILL
    assert end_of(settings) == whole[1]


def best_at_step(step: int):
    """For a fork: the evaluation at `step` is the best by far more than real ones differ, which makes the stop sure."""
    evaluate = loop.evaluate

    def evaluated(run, *arguments):
        figures = evaluate(run, *arguments)
        run.held_out = {**figures, "all": figures["all"] + 100 * abs(run.step - step)}
        return run.held_out

    loop.evaluate = evaluated


def test_a_chain_of_resumes_is_exact_with_every_state_there_is(world, tmp_path):
    """Muon's momenta, the average, the wait for a better evaluation and float16's loss scale: all are kept."""
    options = {
        "optimizer": "muon", "ema_decay": 0.9, "patience": 3, "keep_best": True, "precision": "float16",
        "evaluate_every": 1, "epochs": 3, "on_collapse": "ignore",
    }  # fmt: skip

    def train(settings):
        best_at_step(6)
        survival.train_small(settings)

    untouched = survival.small_run(world, tmp_path / "untouched", **options)
    assert survival.in_fork(lambda: train(untouched)) == 0
    settings = survival.small_run(world, tmp_path, **options)
    last = load_checkpoint("", survival.last_checkpoint(untouched))
    assert (last.best["step"], last.step, last.best["stopped"]) == (6, 9, True)
    # Killed early, then, gone on from step 4, in the step whose evaluation is to end the wait.
    for occurrence in (5, last.step - 4):

        def killed(occurrence=occurrence):
            survival.at(loop, "take_step", "after", occurrence, survival.die)
            train(settings)

        assert survival.in_fork(killed) == -signal.SIGKILL
    assert survival.in_fork(lambda: train(settings)) == 0
    assert survival.result(settings) == survival.result(untouched)
    best = [load_checkpoint("", run.output / checkpoint.BEST_NAME) for run in (untouched, settings)]
    assert best[0].step == best[1].step
    assert all(torch.equal(weight, best[1].average[name]) for name, weight in best[0].average.items())


STRIKES = {
    "at start": (loop, "start_run", "before", 1),
    "in the first evaluation": (loop, "held_out_cross_entropy", "after", 1),
    "mid-step": (torch.Tensor, "backward", "after", 7),
    "in the optimiser": (torch.optim.AdamW, "step", "before", 4),
    "during evaluation": (loop, "held_out_cross_entropy", "after", 2),
    "while logging": (MetricsLog, "write", "before", 3),
    "during a save": (torch, "save", "after", 1),
    "between the renames of a save": (os, "replace", "after", 3),
}
BY_CTRL_C = ("mid-step", "during a save")  # the quick tests' share: both signals take the same way
SIGNALS = [
    pytest.param(where, number, marks=() if number == signal.SIGTERM or where in BY_CTRL_C else pytest.mark.slow)
    for where in STRIKES
    for number in (signal.SIGTERM, signal.SIGINT)
]


@pytest.mark.parametrize(("where", "number"), SIGNALS)
def test_a_signal_leaves_after_the_step_in_hand(world, whole, tmp_path, where, number):
    settings = survival.small_run(world, tmp_path, save_every=1000)  # only the signal saves inside an epoch
    log = settings.logs / "run" / "metrics.jsonl"
    owner, name, when, occurrence = STRIKES[where]
    steps = tmp_path / "steps"

    def count_steps():
        survival.at_every(loop, "take_step", lambda run: steps.open("a").write(f"{run.step}\n"))

    def struck():
        count_steps()
        survival.at(owner, name, when, occurrence, lambda: os.kill(os.getpid(), number))
        survival.train_small(settings)

    def again():
        count_steps()
        survival.train_small(settings)

    assert survival.in_fork(struck, tmp_path / "said") == 128 + number, (tmp_path / "said").read_text()
    done = steps.read_text().count("\n") if steps.exists() else 0
    found = checkpoint.newest_checkpoint(settings.output, lambda epoch: epoch * 10**9)
    assert (found.checkpoint.step if found else 0) == done
    assert done < last_step(whole)
    assert not done or len(read_metrics(log)) >= done
    assert survival.in_fork(again) == 0
    taken = [int(line) for line in steps.read_text().split()]
    assert taken == list(range(last_step(whole)))  # nothing computed twice
    assert survival.result(settings) == whole[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(world, whole, tmp_path, number):
    settings = survival.small_run(world, tmp_path)

    def struck():
        survival.at(torch, "save", "after", 2, lambda: [os.kill(os.getpid(), number) for _ in range(2)])
        survival.train_small(settings)

    assert survival.in_fork(struck) == 128 + number
    found = checkpoint.newest_checkpoint(settings.output, lambda epoch: epoch * 10**9)
    assert found.checkpoint.step == 2  # the save that was cut left nothing, the one before it is whole
    assert end_of(settings) == whole[1]


def test_a_terminal_that_closes_leaves_a_checkpoint(world, whole, tmp_path):
    """The shell and the kernel each send a SIGHUP, the session's manager a SIGTERM; neither cuts the save short."""
    settings = survival.small_run(world, tmp_path, save_every=1000)
    signals = (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP)

    def struck():
        survival.at(torch, "save", "before", 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        survival.at(loop, "take_step", "after", 4, lambda: [os.kill(os.getpid(), number) for number in signals])
        survival.train_small(settings)

    assert survival.in_fork(struck) == 128 + signal.SIGHUP
    found = checkpoint.newest_checkpoint(settings.output, lambda epoch: epoch * 10**9)
    assert found.checkpoint.step == 4
    assert end_of(settings) == whole[1]


def test_what_nohup_has_ignored_stays_ignored(world, whole, tmp_path):
    settings = survival.small_run(world, tmp_path)

    def struck():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        survival.at(loop, "take_step", "after", 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        survival.train_small(settings)

    assert survival.in_fork(struck) == 0
    assert survival.result(settings) == whole[1]


def test_where_nobody_reads_any_more_a_run_leaves_a_checkpoint(world, whole, tmp_path):
    """`indra train | tee log` through a connection that drops."""
    settings = survival.small_run(world, tmp_path, save_every=1000)

    def unread():
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        survival.at(loop, "take_step", "after", 2, lambda: os.close(reader))
        survival.train_small(settings)

    assert survival.in_fork(unread) == 128 + signal.SIGHUP
    found = checkpoint.newest_checkpoint(settings.output, lambda epoch: epoch * 10**9)
    assert found.checkpoint.step == 3  # whose evaluation could not be printed
    assert end_of(settings) == whole[1]


@pytest.mark.parametrize("gone", ["run", "logs", "."])
def test_a_folder_that_is_removed_under_a_run_stops_it_in_one_line(world, whole, tmp_path, gone):
    inside = tmp_path / "inside"
    settings = survival.small_run(world, inside, save_every=1000)

    def remove():
        path = inside / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def struck():
        survival.at(loop, "take_step", "after", 4, remove)
        survival.train_small(settings)

    said = tmp_path / "said"
    assert survival.in_fork(struck, said) == 2
    errors = [line for line in said.read_text().splitlines() if not line.startswith(("step ", "wrote ", "Teacher "))]
    assert len(errors) == 1
    option, path = ("--output", settings.output) if gone in ("run", ".") else ("--logs", "metrics.jsonl")
    assert errors[0].startswith(f"indra: error: {option}: got ")
    assert f"{path}; was removed or replaced while the run wrote to it" in errors[0]
    assert "step 4 is saved" in errors[0]
    assert [line["step"] for line in read_metrics(settings.logs / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert end_of(settings) == whole[1]


def test_another_runs_folder_in_place_of_the_removed_one_is_left_alone(world, tmp_path):
    settings = survival.small_run(world, tmp_path)
    metrics = settings.logs / "run" / "metrics.jsonl"

    def replace():
        shutil.rmtree(settings.output)
        settings.output.mkdir()
        (settings.output / "checkpoint_v4_epoch_1.pt").write_text("another run's")
        metrics.unlink()
        metrics.write_text("another run's\n")

    def struck():
        survival.at(loop, "take_step", "after", 2, replace)
        survival.train_small(settings)

    said = tmp_path / "said"
    assert survival.in_fork(struck, said) == 2
    assert "was replaced by another run's folder" in said.read_text()
    assert [path.name for path in settings.output.iterdir()] == ["checkpoint_v4_epoch_1.pt"]
    assert metrics.read_text() == "another run's\n"
    assert [line["step"] for line in read_metrics(metrics.with_name("metrics.jsonl.set-aside-1"))] == [0, 1]


def test_a_second_trainer_is_refused_and_leaves_everything_alone(world, tmp_path):
    settings = survival.small_run(world, tmp_path, max_steps=1)
    settings.output.mkdir()
    with files.folder_lock("--output", settings.output), pytest.raises(UserError, match="in use by another run"):
        loop.train(settings)
    assert [path.name for path in settings.output.iterdir()] == [".lock"]
    with files.folder_lock("--logs", settings.logs / "run"), pytest.raises(UserError, match="in use by another run"):
        loop.train(settings)
    loop.train(settings)  # a lock that was left is no obstacle


def test_readers_never_see_a_torn_line(tmp_path):
    path, said, lengths = tmp_path / "metrics.jsonl", tmp_path / "said", set()

    def write():
        log = MetricsLog(path)
        for step in range(3000):
            log.write({"step": step, "held_out": {"all": 1.5}})
            if step % 100 == 0:
                time.sleep(0.005)  # so that even a busy machine reads in between

    pid = survival.fork(write, said)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        steps = [line["step"] for line in read_metrics(path)]
        assert steps == list(range(len(steps)))
        lengths.add(len(steps))
    assert os.waitstatus_to_exitcode(ended[1]) == 0, said.read_text()
    assert len(lengths - {0, 3000}) >= 3
    assert len(read_metrics(path)) == 3000
