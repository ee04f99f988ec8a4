"""Damage is seen before use: flipped bits, cut and swapped files, full disks, hostile checkpoints."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import survival
from indraquantum import files
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.metrics import MetricsLog, read_metrics
from indraquantum.teacher.signals import verify_signals
from indraquantum.trackers import NullTracker
from indraquantum.training import checkpoint, loop
from indraquantum.training.checkpoint import load_checkpoint, manifest_path, newest_checkpoint
from indraquantum.training.samples import Samples


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run of six steps, with its data and signals, to be damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(world.data, folder / "mixed")
    shutil.copytree(world.signals, folder / "teacher_signals")
    settings = survival.small_run(world, folder, data=folder / "mixed", epochs=1, save_every=2, keep_last=9)
    survival.train_small(settings)
    return settings


def artefacts(settings) -> list[tuple[Path, Callable[[], object]]]:
    """Every file of checkpoint, data and signals, and what reads it before a run uses it."""
    data, signals = settings.data, settings.data.parent / "teacher_signals"
    dataset = open_dataset("--data", data)
    newest = newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).path
    return [
        *[(path, lambda: load_checkpoint("--resume", newest)) for path in (newest, manifest_path(newest))],
        *[(p, lambda: open_dataset("--data", data, verify=True)) for p in sorted(data.rglob("*")) if p.is_file()],
        *[(p, lambda: verify_signals("--signals", signals, dataset)) for p in sorted(signals.rglob("*.*"))
          if p.is_file() and not p.name.startswith(".")],
    ]  # fmt: skip


def refused(path: Path, content: bytes, read: Callable[[], object]) -> bool:
    """Whether `read` refuses, in one line, when `path` holds `content`; it then holds what it did."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        read()
    except UserError as error:
        return "\n" not in str(error)
    finally:
        path.write_bytes(before)
    return False


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_caught(run, flips):
    draw, things = random.Random(1), artefacts(run)
    for read in {id(read): read for _, read in things}.values():
        read()  # whole, it is accepted
    for number in range(flips):
        path, read = things[number % len(things)]
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        assert refused(path, bytes(content), read), (path, place)


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_every_cut_or_swapped_file_is_caught(run, count):
    draw, things = random.Random(2), artefacts(run)
    others = [path for path, _ in things] + sorted(run.output.glob("*.pt")) + sorted(run.output.glob("*.json"))
    for number in range(count):
        path, read = things[number % len(things)]
        content = path.read_bytes()
        if number % 3 == 0:
            other = draw.choice([other for other in others if other.read_bytes() != content])
            assert refused(path, other.read_bytes(), read), (path, other)
        else:
            length = draw.randrange(len(content))
            assert refused(path, content[:length], read), (path, length)


def test_both_files_of_one_step_under_the_name_of_another_are_refused(run, tmp_path):
    for end in ("pt", "json"):
        shutil.copy(run.output / f"checkpoint_v4_step_2.{end}", tmp_path / f"checkpoint_v4_step_4.{end}")
    with pytest.raises(UserError, match=r"step_4\.json; is damaged"):
        load_checkpoint("--resume", tmp_path / "checkpoint_v4_step_4.pt")


def test_automatic_resume_falls_back_with_one_warning_and_an_explicit_one_never(world, run, tmp_path, capsys):
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1, keep_last=9)
    shutil.copytree(run.output, settings.output)
    shutil.copytree(run.logs, settings.logs)
    newest = newest_checkpoint(run.output, lambda epoch: epoch * 10**6).path.name
    for name in (newest, "checkpoint_v4_step_4.pt"):
        (settings.output / name).write_bytes(b"damaged")
    explicit = settings.model_copy(update={"resume": str(settings.output / newest)})
    with pytest.raises(UserError, match=f"--resume: got .*{newest}; must be a checkpoint") as error:
        survival.train_small(explicit)
    assert error.value.exit_status == 2
    survival.train_small(settings)
    said = capsys.readouterr()
    assert said.err.count("warning") == 1
    assert "Using checkpoint_v4_step_2.pt" in said.err
    assert "Resuming from step 2" in said.out
    assert survival.result(settings) == survival.result(run)


def test_where_every_checkpoint_is_damaged_nothing_starts_over(world, run, tmp_path):
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1)
    settings.output.mkdir()
    (settings.output / "checkpoint_v4_epoch_1.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        survival.train_small(settings)
    with pytest.raises(UserError, match="--resume: got never; must be auto"):
        survival.train_small(settings.model_copy(update={"resume": "never"}))


def test_going_back_on_purpose_is_exact_too(world, run, tmp_path):
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1, max_steps=None, keep_last=9)
    shutil.copytree(run.output, settings.output)
    shutil.copytree(run.logs, settings.logs)
    back = settings.model_copy(update={"resume": str(settings.output / "checkpoint_v4_step_2.pt")})
    survival.train_small(back)
    assert survival.result(settings) == survival.result(run)
    assert (settings.output / "checkpoint_v4_step_4.pt.set-aside-1").exists()


WRITES = [(checkpoint.Path, "write_bytes"), (checkpoint.Path, "write_text"), (os, "fsync"), (os, "replace"),
          (files, "fsync_folder")]  # fmt: skip
FAILURES = [
    pytest.param(owner, name, code, id=f"{owner.__name__}-{name}-{errno.errorcode[code]}",
                 marks=() if code == errno.ENOSPC or name == "write_bytes" else pytest.mark.slow)
    for owner, name in WRITES
    for code in (errno.ENOSPC, errno.EROFS, errno.EIO)
]  # fmt: skip


@pytest.mark.parametrize("occurrence", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("owner", "name", "code"), FAILURES)
def test_a_write_that_fails_harms_nothing(world, run, tmp_path, owner, name, code, occurrence):
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1, keep_last=9)

    def fail():
        raise OSError(code, os.strerror(code))

    def failing():
        # from the second checkpoint on, so that a complete one exists
        strike = lambda: survival.at(owner, name, "before", occurrence, fail)  # noqa: E731
        survival.at(loop, "save", "before", 2, strike)
        survival.train_small(settings)

    status, said = survival.in_fork(failing, tmp_path / "said"), (tmp_path / "said").read_text()
    assert status == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("indra: error: ")]
    assert os.strerror(code) in line
    # How much of the log is not on the disk yet is unknown.
    assert ("bytes free)" if name == "fsync" and "metrics.jsonl" in line else "bytes needed") in line
    assert str(tmp_path) in line
    assert newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).checkpoint.step >= 2
    survival.train_small(settings)
    assert survival.result(settings) == survival.result(run)


def test_a_disk_that_is_really_full(world, run, tmp_path):
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1, keep_last=9)

    def limited():
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

        survival.at(checkpoint.Path, "write_bytes", "before", 2, limit)
        survival.train_small(settings)

    assert survival.in_fork(limited, tmp_path / "said") == 2
    assert "could not be written: File too large" in (tmp_path / "said").read_text()
    assert newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).checkpoint.step == 2
    survival.train_small(settings)
    assert survival.result(settings) == survival.result(run)


@pytest.mark.parametrize("step", [5, 6])  # without an evaluation, and with the last one, which is the best so far
@pytest.mark.parametrize(("owner", "name"), [(MetricsLog, "write"), (Samples, "__call__")], ids=["metrics", "samples"])
def test_a_full_disk_of_the_logs_costs_no_step(world, run, tmp_path, owner, name, step):
    sampled = {"sample_every": 1, "sample_prompt": ("the cat",)}
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1, save_every=1000, **sampled)

    def full(*_):
        raise files.not_written("--logs", settings.logs, 9, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def failing():
        survival.at(loop, "take_step", "after", step, lambda: setattr(owner, name, full))
        survival.train_small(settings)

    assert survival.in_fork(failing, tmp_path / "said") == 2
    said = (tmp_path / "said").read_text()
    assert said.count("indra: error: --logs: got ") == 1
    assert f"step {step} is saved in {settings.output}: to resume, run the same command\n" in said
    assert newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).checkpoint.step == step
    survival.train_small(settings)
    assert survival.result(settings) == survival.result(run)


def lost(*_):
    raise files.not_written("--logs", Path("metrics"), 9, OSError(errno.EIO, os.strerror(errno.EIO)))


def crash(*_):
    raise RuntimeError("of a tracker")


@pytest.mark.parametrize(
    "broken",
    [
        ((MetricsLog, "write", lost), (MetricsLog, "sync", lost)),
        ((MetricsLog, "sync", lost),),
        ((MetricsLog, "write", lost), (NullTracker, "flush", crash)),
    ],
    ids=["disk", "fsync", "tracker"],
)
def test_a_broken_disk_of_the_logs_costs_no_step(world, run, tmp_path, broken):
    """The last step is the best so far, so its first checkpoint is that of the best."""
    settings = survival.small_run(world, tmp_path, data=run.data, epochs=1, save_every=1000, keep_best=True)

    def breaks():
        for owner, name, action in broken:
            setattr(owner, name, action)

    def failing():
        survival.at(loop, "take_step", "after", 6, breaks)
        survival.train_small(settings)

    assert survival.in_fork(failing, tmp_path / "said") == 2
    said = (tmp_path / "said").read_text()
    assert said.count(f"could not be written: {os.strerror(errno.EIO)} (9 bytes needed") == 1
    assert f"step 6 is saved in {settings.output}: to resume, run the same command\n" in said
    survival.train_small(settings)
    assert survival.result(settings) == survival.result(run)
    assert load_checkpoint("", settings.output / checkpoint.BEST_NAME).step == 6


def test_a_metrics_line_that_does_not_fit_is_taken_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 0})
    whole = log._file

    class Short:
        """A file on a disk that has room for 9 bytes."""

        def write(self, line):
            return whole.write(line[:9])

        def __getattr__(self, name):
            return getattr(whole, name)

    log._file = Short()
    with pytest.raises(UserError, match=r"metrics\.jsonl; could not be written: No space.*bytes needed"):
        log.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    log.close()


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(canary: Path) -> list[bytes]:
    """Pickles that would make `canary`."""
    import torch.utils.collect_env

    write = f"open({str(canary)!r}, 'w')"
    calls = [
        Calls(open, str(canary), "w"), Calls(eval, write), Calls(exec, write), Calls(os.system, f"touch {canary}"),
        Calls(os.mkdir, str(canary)), Calls(torch.utils.collect_env.run, f"touch {canary}"),
        Calls(getattr, Calls(__import__, "os"), "system"), Calls(Path.touch, canary), Calls(torch.load, str(canary)),
    ]  # fmt: skip
    old = f"(S'touch {canary}'\nios\nsystem\n.".encode(), f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    return [pickle.dumps({"format": checkpoint.FORMAT, "x": call}, protocol=2) for call in calls] + list(old)


@pytest.mark.parametrize("number", range(11))
def test_a_hostile_checkpoint_runs_nothing(run, tmp_path, number):
    canary, path = tmp_path / "canary", tmp_path / "checkpoint_v4_epoch_1.pt"
    payload = hostile(canary)[number]
    source = newest_checkpoint(run.output, lambda epoch: epoch * 10**6).path
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w") as archive:
        for part in whole.namelist():  # a real checkpoint with another pickle
            archive.writestr(part, payload if part.endswith("data.pkl") else whole.read(part))
    for with_manifest in (False, True):
        if with_manifest:  # which proves that the bytes are whole, not that they are good
            text = checkpoint.manifest_text(path.name, path.stat().st_size, files.sha256_of(path), 1)
            manifest_path(path).write_text(text)
        with pytest.raises(UserError, match="more than tensors"):
            load_checkpoint("CHECKPOINT", path)
    manifest_path(path).unlink()
    path.write_bytes(payload)  # as old versions of torch wrote them
    with pytest.raises(UserError, match="must be a checkpoint"):
        load_checkpoint("CHECKPOINT", path)
    assert not canary.exists()
