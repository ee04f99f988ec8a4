"""Nothing is ever half-written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import sys

import filelock
import pytest

from indraquantum import files
from indraquantum.errors import UserError
from indraquantum.files import (
    atomic_file,
    atomic_folder,
    folder_lock,
    is_locked,
    make_folder,
    names_aside,
    read_json,
    sha256_of,
    try_lock,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:  # noqa: PT012 - the block is what fails
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_place_as_a_whole(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "stale").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:  # noqa: PT012 - the block is what fails
        (temporary / "new").write_text("half")
        raise RuntimeError
    assert [p.name for p in folder.iterdir()] == ["stale"]
    with atomic_folder(folder) as temporary:
        (temporary / "new").write_text("whole")
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture
def synced(monkeypatch):
    """Return `synced(failure)`: what is synced from then on, "file" or "folder"; folders fail with `failure`."""

    def record(failure: int | None) -> list[str]:
        kinds, fsync = [], os.fsync

        def sync(descriptor):
            kinds.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
            if failure and kinds[-1] == "folder":
                raise OSError(failure, os.strerror(failure))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        return kinds

    return record


@pytest.mark.parametrize("failure", ["EINVAL", "EBADF", "ENOTSUP"])
def test_a_folder_that_can_not_be_synced_gets_its_file(tmp_path, synced, failure):
    """The rename has succeeded by then, and a shared folder of VirtualBox or Samba can do no more."""
    kinds = synced(getattr(errno, failure))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("new")
    assert kinds == ["file", "folder"] * 2
    assert [(tmp_path / name).read_text() for name in ("file", "folder/part")] == ["new", "new"]


def test_a_disk_that_fails_is_told(tmp_path, synced):
    synced(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")


@pytest.mark.parametrize("can", [True, False])
def test_on_a_mac_the_cache_of_the_drive_is_emptied_too(tmp_path, synced, monkeypatch, can):
    kinds, asked = synced(None), []

    def full_sync(descriptor, request):
        asked.append(request)
        if not can:
            raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)  # its number in macOS's <sys/fcntl.h>
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert asked == [51, 51]
    assert kinds == ([] if can else ["file", "folder"])


def test_a_folder_comes_back_where_the_exchange_is_cut(tmp_path, monkeypatch):
    """Between the two renames: the old one has gone, the new one has not come."""
    folder, renamed, replace = tmp_path / "folder", [], os.replace
    folder.mkdir()
    (folder / "old").write_text("old")

    def cut(source, target):
        renamed.append(source)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as temporary:
        (temporary / "new").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_links_to_another_disk_stay(tmp_path):
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inside").write_text("new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "folder").is_symlink()
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert names == {"disk", "disk/file", "disk/folder", "disk/folder/inside", "file", "folder"}


def test_others_may_read_what_a_library_wrote_for_its_owner(tmp_path):
    def private(path):
        path.write_text("x")
        path.chmod(0o600)

    with atomic_file(tmp_path / "file") as temporary:
        private(temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        private(temporary / "file")
    (tmp_path / "plain").write_text("x")
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "folder" / "file").stat().st_mode == expected


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output: got .*file/below"):
        make_folder("--output", tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "must be JSON"),
        (b'"\xff"', "must be UTF-8"),
        (None, "No such file"),
        (b"[" * 100_000, "that can be read"),
        (b"1" * 5000, "that can be read"),
    ],
)
def test_bad_json_is_one_line(tmp_path, content, reason):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_json("--data", path)
    assert "\n" not in str(error.value)


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, "é"]})
    assert read_json("--data", tmp_path / "x.json") == {"a": [1, "é"]}


def test_a_look_at_a_folder_never_keeps_a_run_out_of_it(tmp_path, monkeypatch):
    """The run starts while the look holds what it holds, and the look does not let go before."""
    flock, started = fcntl.flock, []

    def start_within(descriptor, kind):
        flock(descriptor, kind)
        if not started:
            started.append(kind)
            with folder_lock("--logs", tmp_path):
                started.append("run")

    monkeypatch.setattr(files, "LOOK_SECONDS", 0.01)
    (tmp_path / ".lock").touch()
    (tmp_path / ".running").touch()  # of a run that was killed
    monkeypatch.setattr(fcntl, "flock", start_within)
    assert not is_locked(tmp_path)
    assert started[1:] == ["run"]


def test_who_holds_a_folder_is_seen_by_all_who_look(tmp_path):
    assert not is_locked(tmp_path)
    with folder_lock("--logs", tmp_path):
        (tmp_path / ".running").chmod(0o444)
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="is in use by another run"), folder_lock("--logs", tmp_path):
            pass
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, monkeypatch):
    def no_locks(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    said = rf"^--logs: got \S+; must be on a file system with locks, .*{os.strerror(errno.ENOLCK)}\); give another"
    with pytest.raises(UserError, match=said), folder_lock("--logs", tmp_path):
        pass


def test_a_lock_file_of_someone_else_is_one_line(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", denied)
    said = r"^--logs: got \S+\.lock; must be accessible to you; check its permissions \(Permission denied\), or give"
    with pytest.raises(UserError, match=said), folder_lock("--logs", tmp_path):
        pass


def test_a_lock_on_a_folder_that_was_replaced_counts_for_nothing(tmp_path, monkeypatch):
    folder, flock = tmp_path / "folder", fcntl.flock
    folder.mkdir()
    with try_lock(folder) as locked:
        assert locked

    def replaced(descriptor, kind):
        folder.rmdir()
        folder.mkdir()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with try_lock(folder) as locked:
        assert not locked


def test_names_aside_are_free_for_all(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert names_aside(one, other) == [tmp_path / "one.set-aside-1", tmp_path / "other.set-aside-1"]
    (tmp_path / "other.set-aside-1").touch()
    (tmp_path / "one.set-aside-2").touch()
    assert names_aside(one, other) == [tmp_path / "one.set-aside-3", tmp_path / "other.set-aside-3"]
