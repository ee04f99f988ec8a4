"""A run of several processes is the run of one: its losses, its files, its stops. Gloo, on loopback."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import forked
import survival
from indraquantum.files import folder_lock
from indraquantum.metrics import read_metrics
from indraquantum.teacher.signals import SignalStore
from indraquantum.training import checkpoint, loop, parallel, samples
from indraquantum.training import signals as training_signals
from indraquantum.training.checkpoint import load_checkpoint, newest_checkpoint

STEPS, STEPS_PER_EPOCH = 50, 6
CHANGES = {"dropout": 0.0, "epochs": 100, "max_steps": STEPS, "evaluate_every": 20, "save_every": 10, "layers": 2,
           "d_model": 11, "state_width": 10, **survival.STEADY}  # fmt: skip
TERMS = ("loss", "ce", "kd", "kd_estimate", "phase", "magnitude", "magnitude_mean", "phase_mean")


def settings_of(world, folder: Path, **changes):
    return survival.small_run(world, folder, **{**CHANGES, **changes})


@pytest.fixture(scope="module")
def one(world, tmp_path_factory):
    """The run of one process."""
    settings = settings_of(world, tmp_path_factory.mktemp("one"))
    assert survival.in_fork(lambda: survival.train_small(settings)) == 0
    return settings


def lines_of(settings) -> list[dict]:
    return read_metrics(settings.logs / "run" / "metrics.jsonl")


def same_run(settings, one) -> None:
    """All lines agree within 1e-4, and the last checkpoint has the same parts and nearly the same weights."""
    lines, expected = lines_of(settings), lines_of(one)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        for name in TERMS:
            assert line[name] == pytest.approx(other[name], abs=1e-4), (line["step"], name)
        assert (line["tokens"], line["epoch"], line["learning_rate"]) == (
            other["tokens"], other["epoch"], other["learning_rate"],
        )  # fmt: skip
        assert line["held_out"] == (other["held_out"] and pytest.approx(other["held_out"], abs=1e-4))
    a, b = (load_checkpoint("", survival.last_checkpoint(s)) for s in (settings, one))
    assert (a.step, a.tokens, a.finished, a.settings, a.guard["found"]) == (
        b.step, b.tokens, b.finished, b.settings, b.guard["found"],
    )  # fmt: skip
    assert a.optimizer["param_groups"] == b.optimizer["param_groups"]
    assert list(a.model) == list(b.model)
    torch.testing.assert_close(a.model, b.model, rtol=1e-3, atol=1e-3)
    assert a.optimizer["state"].keys() == b.optimizer["state"].keys()
    for number, entry in b.optimizer["state"].items():
        for name, value in entry.items():  # the squares are so small that only a relative error can tell them
            error = (a.optimizer["state"][number][name] - value).norm()
            assert error <= 1e-2 * value.norm(), (number, name)


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp2", 2), pytest.param("ddp", 3, marks=pytest.mark.slow)])
def test_several_processes_are_one(world, one, tmp_path, kind, ranks):
    settings = settings_of(world, tmp_path, parallel=kind)
    assert forked.run(ranks, lambda rank: survival.train_small(settings), tmp_path) == [0] * ranks, forked.said(
        tmp_path
    )
    same_run(settings, one)
    assert sorted(path.name for path in settings.output.iterdir()) == sorted(p.name for p in one.output.iterdir())
    assert "held-out" in (tmp_path / "said.0").read_text()
    assert [forked.said_by(tmp_path / f"said.{rank}") for rank in range(1, ranks)] == [""] * (ranks - 1)


def stop_after(step: int, rank: int, number: int):
    """Strike this process, if it is `rank`, with a signal after `step` steps."""
    take_step = loop.take_step

    def struck(run):
        metrics = take_step(run)
        if run.step == step and run.processes.rank == rank:
            os.kill(os.getpid(), number)
        return metrics

    loop.take_step = struck


def test_one_ddp_fsdp2_one(world, one, tmp_path):
    """A signal to any of the processes stops them all with a checkpoint, from which any other number resumes."""
    for kind, ranks, struck, step in (("auto", 1, 0, 7), ("ddp", 2, 1, 23), ("fsdp2", 2, 0, 36)):
        settings, folder = settings_of(world, tmp_path, parallel=kind), tmp_path / kind

        def act(_, step=step, struck=struck, settings=settings):
            stop_after(step, struck, signal.SIGTERM)
            survival.train_small(settings)

        assert forked.run(ranks, act, folder) == [143] * ranks, forked.said(folder)
        assert newest_checkpoint(settings.output, lambda epoch: epoch * STEPS_PER_EPOCH).checkpoint.step == step
        assert forked.said(folder).count("Stopped at step") == 1
    assert survival.in_fork(lambda: survival.train_small(settings)) == 0
    same_run(settings, one)


def test_a_killed_process_ends_the_others_and_the_same_command_resumes(world, one, tmp_path):
    settings = settings_of(world, tmp_path)

    def act(_):
        stop_after(24, 1, signal.SIGKILL)
        survival.train_small(settings)

    statuses = forked.run(2, act, tmp_path / "killed")
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] == 1
    assert "Traceback" not in forked.said(tmp_path / "killed")
    assert newest_checkpoint(settings.output, lambda epoch: epoch * STEPS_PER_EPOCH).checkpoint.step == 20
    assert forked.run(2, lambda _: survival.train_small(settings), tmp_path / "again") == [0, 0]
    same_run(settings, one)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("ddp", "signals of one process"),
        ("fsdp2", "weights"),
        pytest.param("ddp", "weights", marks=pytest.mark.slow),
        pytest.param("fsdp2", "signals of one process", marks=pytest.mark.slow),
    ],
)
def test_nan_stops_all(world, tmp_path, kind, where):
    settings = settings_of(world, tmp_path, parallel=kind, save_every=2)

    def act(rank):
        take_step, batch = loop.take_step, SignalStore.batch

        def nan_signals(self, split, index_N):
            found = batch(self, split, index_N)
            found.entropy_N[5] = float("nan")
            return found

        def struck(run):
            if run.step == 3 and where == "weights":
                next(iter(run.model.parameters())).data.mul_(float("nan"))
            if run.step == 3 and where != "weights" and rank == 1:
                SignalStore.batch = nan_signals
            return take_step(run)

        loop.take_step = struck
        survival.train_small(settings)

    assert forked.run(2, act, tmp_path) == [3, 3], forked.said(tmp_path)
    assert forked.said(tmp_path).count("indra: error: step 4: ") == 1
    assert newest_checkpoint(settings.output, lambda epoch: epoch * STEPS_PER_EPOCH).checkpoint.step == 2
    assert [line["step"] for line in lines_of(settings)] == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_names_the_rows_of_any_process(world, tmp_path):
    settings = settings_of(world, tmp_path)

    def act(rank):
        forward = parallel.MicroBatchPass.forward

        def struck(self, batch, *arguments, **options):
            result = forward(self, batch, *arguments, **options)
            bad = rank == 1 and (batch.labels >= 0).any() and batch.index.max() == highest
            return (
                result._replace(terms=result.terms._replace(total=result.terms.total * float("nan"))) if bad else result
            )

        take_step = loop.take_step
        highest = None

        def watched(run):
            nonlocal highest
            rows = run.plan.at(run.step).rows_of(run.step)
            highest = int(run.dataset.train.batch(rows[-1:]).index.max())
            (tmp_path / "row").write_text(str(rows[-1]))
            return take_step(run)

        loop.take_step = watched
        parallel.MicroBatchPass.forward = struck
        survival.train_small(settings)

    assert forked.run(2, act, tmp_path) == [3, 3], forked.said(tmp_path)
    assert f"not finite because of rows [{(tmp_path / 'row').read_text()}]" in forked.said(tmp_path)


def test_a_loss_that_is_not_finite_stops_a_process_without_a_row_too(world, tmp_path):
    settings = settings_of(world, tmp_path, batch_tokens=48, max_steps=2)

    def act(_):
        forward = parallel.MicroBatchPass.forward

        def struck(self, batch, *arguments, **options):
            result = forward(self, batch, *arguments, **options)
            if not (batch.labels >= 0).any():
                return result
            return result._replace(terms=result.terms._replace(total=result.terms.total * float("nan")))

        parallel.MicroBatchPass.forward = struck
        survival.train_small(settings)

    assert forked.run(2, act, tmp_path) == [3, 3], forked.said(tmp_path)
    assert "not finite because of rows [" in forked.said(tmp_path)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_process_without_memory_ends_all_and_says_it_once(world, tmp_path, kind):
    """The others wait for its gradients, so it can't ask them before it ends."""
    settings = settings_of(world, tmp_path, parallel=kind)

    def act(rank):
        take_step, forward = loop.take_step, parallel.MicroBatchPass.forward

        def step(run):
            def full(self, *arguments, **options):
                if rank == 1 and run.step == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                return forward(self, *arguments, **options)

            parallel.MicroBatchPass.forward = full
            return take_step(run)

        loop.take_step = step
        survival.train_small(settings)

    statuses = forked.run(2, act, tmp_path)
    assert statuses == [1, 2]
    said = forked.said(tmp_path)
    assert said.count("--micro-batch-tokens: got 768; must be smaller") == 1
    assert said.count("indra: error: process 0: another process of this run ended, so this one ends too") == 1
    assert said.count("indra: error") == 2
    assert "Traceback" not in said


@pytest.mark.parametrize("evaluate_every", [20, 1])
def test_a_removed_folder_ends_all_with_a_checkpoint(world, tmp_path, evaluate_every):
    settings = settings_of(world, tmp_path, evaluate_every=evaluate_every)

    def act(_):
        take_step = loop.take_step

        def removed(run):
            metrics = take_step(run)
            if run.step == 3 and run.processes.is_first:
                shutil.rmtree(settings.output)
            return metrics

        loop.take_step = removed
        loop.train(settings)

    assert forked.run(2, act, tmp_path) == [2, 2], forked.said(tmp_path)
    assert forked.said(tmp_path).count("was removed or replaced while the run wrote to it; step 3 is saved") == 1
    assert newest_checkpoint(settings.output, lambda epoch: epoch * STEPS_PER_EPOCH).checkpoint.step == 3


def test_a_full_disk_ends_all(world, tmp_path):
    settings = settings_of(world, tmp_path, save_every=2)

    def act(_):
        def full(path, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        checkpoint.Path.write_bytes = full
        survival.train_small(settings)

    assert forked.run(2, act, tmp_path) == [2, 2], forked.said(tmp_path)
    assert forked.said(tmp_path).count("No space left") == 1


def test_a_sample_that_cannot_be_written_ends_all(world, tmp_path):
    settings = settings_of(world, tmp_path, sample_every=2, sample_prompt=("the cat",))

    def act(_):
        def full(path, *_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        samples.sample = lambda *_: setattr(samples.Path, "open", full)
        survival.train_small(settings)

    assert forked.run(2, act, tmp_path) == [2, 2], forked.said(tmp_path)
    assert forked.said(tmp_path).count("samples.jsonl; could not be written: No space left") == 1


def test_folders_in_use_and_wrong_options_are_refused_once(world, tmp_path):
    settings = settings_of(world, tmp_path)
    settings.output.mkdir()
    with folder_lock("--output", settings.output):
        assert forked.run(2, lambda _: loop.train(settings), tmp_path / "a") == [2, 2]
    assert forked.said(tmp_path / "a").count("in use by another run") == 1
    wrong = settings_of(world, tmp_path, heads=3)
    assert forked.run(2, lambda _: loop.train(wrong), tmp_path / "b") == [2, 2]
    assert forked.said(tmp_path / "b").count("--heads") == 1
    assert not list(settings.output.glob("*.pt"))


def test_signals_are_captured_by_the_first_while_the_others_wait(world, tmp_path):
    data = tmp_path / "mixed"
    shutil.copytree(world.data, data)
    settings = settings_of(world, tmp_path, data=data, teacher=str(world.teacher), max_steps=1)
    captures = tmp_path / "captures"

    def act(rank):
        survival.at_every(training_signals, "capture", lambda *_: captures.open("a").write(f"{rank}\n"))
        loop.train(settings)

    assert forked.run(2, act, tmp_path) == [0, 0], forked.said(tmp_path)
    assert captures.read_text() == "0\n"
    manifest = (tmp_path / "teacher_signals" / "manifest.json").read_text()
    assert manifest == (world.signals / "manifest.json").read_text().replace(str(world.signals), str(tmp_path))


def test_other_commands_are_refused_under_torchrun(monkeypatch, capsys):
    from indraquantum import cli

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["prepare"])
    assert "only `indra train` runs in several" in capsys.readouterr().err


@contextlib.contextmanager
def torchrun(settings, *options: str):
    """`torchrun ... -m indraquantum train ...` with these settings; what it says is in its attribute `said`."""
    given = settings.model_dump(exclude_unset=True, mode="json")
    # Without the two dashes, torchrun would take `--logs` for an abbreviation of its own options.
    arguments = ["--", "train", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    said = settings.output.parent / "torchrun.txt"
    with said.open("w") as file:
        launched = subprocess.Popen([*command, "-m", "indraquantum", *arguments], stdout=file, stderr=file)
    launched.said = said
    try:
        yield launched
    finally:
        launched.terminate()
        launched.wait(60)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(settings, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines_of(settings)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_torchrun_restarts_a_killed_process(world, one, tmp_path, kind):
    settings = settings_of(world, tmp_path, parallel=kind)
    with torchrun(settings, "--max-restarts", "1", "--monitor-interval", "0.1") as launched:
        wait_for_step(settings, 12)
        os.kill(children(launched.pid)[1], signal.SIGKILL)
        assert launched.wait(200) == 0, launched.said.read_text()
        assert "Resuming from step" in launched.said.read_text()
    same_run(settings, one)


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint(world, one, tmp_path):
    settings = settings_of(world, tmp_path, save_every=1000)
    with torchrun(settings) as launched:
        wait_for_step(settings, 13)
        launched.send_signal(signal.SIGTERM)
        launched.wait(60)
        assert launched.said.read_text().count("Stopped at step") == 1
    step = newest_checkpoint(settings.output, lambda epoch: epoch * STEPS_PER_EPOCH).checkpoint.step
    assert step == lines_of(settings)[-1]["step"] >= 13
    with torchrun(settings) as again:
        assert again.wait(200) == 0, again.said.read_text()
    same_run(settings, one)
