"""Checkpoints: whole or refused, and never running code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile

import pytest
import torch

from indraquantum.errors import UserError
from indraquantum.training import checkpoint as checkpoints
from indraquantum.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    manifest_path,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
    step_checkpoint_path,
)


def example(step: int = 3) -> Checkpoint:
    return Checkpoint(
        model_config={"d_model": 2}, model={"w": torch.arange(35.0).reshape(5, 7)}, average={}, optimizer={"state": {}},
        step=step, tokens=11, finished=False, pending=None, guard={}, best={}, loss_scale={}, settings={"seed": 0},
        tokenizer={"json": "{}", "bos_id": 0, "eos_id": 1},
    )  # fmt: skip


def test_round_trip(tmp_path):
    path = checkpoint_path(tmp_path, 13)
    save_checkpoint(path, example())
    loaded = load_checkpoint("CHECKPOINT", path)
    assert path.name == "checkpoint_v4_epoch_13.pt"
    assert torch.equal(loaded.model["w"], example().model["w"])
    assert (loaded.step, loaded.settings, loaded.finished) == (3, {"seed": 0}, False)


def test_the_newest_is_by_number_not_by_name(tmp_path):
    for epoch in (2, 10, 9):
        save_checkpoint(checkpoint_path(tmp_path, epoch), example(step=epoch * 3))
    (tmp_path / "checkpoint_v4_epoch_99.pt.tmp").write_text("")
    save_checkpoint(step_checkpoint_path(tmp_path, 29), example(step=29))
    assert newest_checkpoint(tmp_path, lambda epoch: epoch * 3).path.name == "checkpoint_v4_epoch_10.pt"
    assert newest_checkpoint(tmp_path, lambda epoch: epoch * 2).path.name == "checkpoint_v4_step_29.pt"


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path, int) is None


def test_flipped_bits_in_the_weights_of_a_lone_file_are_caught(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, example())
    manifest_path(path).unlink()
    content = path.read_bytes()
    weights = content.index(example().model["w"].numpy().tobytes())
    for offset in range(0, 140, 9):
        damaged = bytearray(content)
        damaged[weights + offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint("CHECKPOINT", path)


def test_truncated_files_are_refused_in_one_line(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, example())
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"CHECKPOINT: got .*checkpoint_v4_epoch_1\.pt; must be") as error:
            load_checkpoint("CHECKPOINT", path)
        assert "\n" not in str(error.value)


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_a_hostile_file_runs_nothing(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "hostile.pt"
    torch.save({"format": "indraquantum-checkpoint", "x": Hostile(canary)}, path)
    with pytest.raises(UserError, match="more than tensors"):
        load_checkpoint("CHECKPOINT", path)
    path.write_bytes(pickle.dumps(Hostile(canary)))  # a bare pickle, as torch.load would take from old versions
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_checkpoint("CHECKPOINT", path)
    assert not canary.exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1], {"format": "indraquantum-checkpoint", "format_version": 99}])
def test_files_of_others_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="must be a checkpoint"):
        load_checkpoint("CHECKPOINT", tmp_path / "x.pt")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello", "world")
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="must be a checkpoint"):
        load_checkpoint("CHECKPOINT", tmp_path / "x.pt")


def test_nothing_that_was_set_aside_is_overwritten(tmp_path):
    path = checkpoint_path(tmp_path, 2)
    for step in (5, 6, 7):
        save_checkpoint(path, example(step=step))
        if step == 6:  # copied without its manifest
            manifest_path(path).unlink()
        set_aside([path])
    names = [f"{path.name}.set-aside-{number}" for number in (1, 2, 3)]
    assert [load_checkpoint("", tmp_path / name).step for name in names] == [5, 6, 7]
    manifests = [f"{manifest_path(path).name}.set-aside-{number}" for number in (1, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names + manifests)


NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
OBSTACLES = {
    "disk": (checkpoints, "sha256_of", OSError(errno.EIO, os.strerror(errno.EIO))),
    "permission": (checkpoints.Path, "read_bytes", PermissionError(errno.EACCES, os.strerror(errno.EACCES))),
    "memory of torch": (torch, "load", NO_MEMORY),
    "memory of Python": (torch, "load", MemoryError()),
    "a zip without its manifest": (zipfile.ZipFile, "testzip", OSError(errno.EIO, os.strerror(errno.EIO))),
    "its memory": (torch, "load", NO_MEMORY),
    "a driver": (torch, "load", RuntimeError("of the driver")),
    "another torch": (torch, "load", pickle.UnpicklingError("Weights only load failed")),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_a_checkpoint_that_cannot_be_read_at_present_is_left_alone(tmp_path, monkeypatch, case):
    for step in (3, 4):
        save_checkpoint(step_checkpoint_path(tmp_path, step), example(step=step))
    if case in ("a zip without its manifest", "its memory"):
        manifest_path(step_checkpoint_path(tmp_path, 4)).unlink()
    before = sorted(tmp_path.iterdir())
    owner, name, error = OBSTACLES[case]

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as obstacle:
        obstacle.setattr(owner, name, fail)
        with pytest.raises(UserError, match=r"--output: got \S+step_4\.pt; .*; it was left as it is\. To") as refused:
            newest_checkpoint(tmp_path, int)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before
    assert newest_checkpoint(tmp_path, int).checkpoint.step == 4


def test_a_checkpoint_of_a_later_version_is_left_alone(tmp_path):
    save_checkpoint(step_checkpoint_path(tmp_path, 3), example(step=3))
    later = step_checkpoint_path(tmp_path, 4)
    torch.save({"format": "indraquantum-checkpoint", "format_version": 99}, later)
    with pytest.raises(UserError, match=r"step_4\.pt; .*format version 4, not 99\); it was left as it is"):
        newest_checkpoint(tmp_path, int)
    assert later.exists()


def test_a_checkpoint_of_an_earlier_version_has_no_shards(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, example())
    content = torch.load(path, weights_only=True)
    del content["signal_shards"]
    manifest_path(path).unlink()
    torch.save(content, path)
    assert load_checkpoint("", path).signal_shards == {}
