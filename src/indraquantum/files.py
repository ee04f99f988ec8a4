"""Reads and writes files safely: atomic writing, checksums, locks, and errors that name the file.

Nothing is ever half-written: a file gets a temporary name beside its target, is fsynced, and is then renamed. No
maintained library does this for folders too. filelock provides the lock of a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError, refused_by_system

_UMASK = os.umask(0)  # the only way to read it
os.umask(_UMASK)


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_sha256(digests: Iterable[str]) -> str:
    """Return one hex SHA-256 for several of them, in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# The answers of file systems that can't sync a folder, such as shared folders of a virtual machine and network drives.
NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def fsync_folder(path: Path) -> None:
    """Make sure that a rename inside `path` survives a crash of the machine, if the file system can promise that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:  # the rename itself has succeeded
            raise
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    """Bring what was written to the disk. On macOS, only F_FULLFSYNC empties the drive's cache; see fsync(2) there."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # some file systems lack it
            pass
    os.fsync(descriptor)


def make_folder(field: str, path: Path) -> Path:
    """Create `path` with its parents and check that a file can be written there.

    Raises:
        UserError: the folder can't be created or written; `field` is the option to name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(field, path, f"must be a folder that can be written ({error.strerror})") from None
    return path


def check_new_file(field: str, path: Path) -> None:
    """Check before long work that its result can be written to `path`, and create the folder.

    Raises:
        UserError: it is a folder, or can't be written there; `field` is the option to name.
    """
    if path.is_dir():
        raise UserError(field, path, "must be a file, not a folder")
    make_folder(field, path.parent)


def unreadable(field: str, path: Path, error: OSError | UnicodeDecodeError) -> UserError:
    """Return the error for a file at `path` that can't be read, or is not UTF-8."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(field, path, f"must be UTF-8 text (byte {error.start} is not)")
    return UserError(field, path, f"must be a file that can be read ({error.strerror})")


def not_written(field: str, path: Path, size: int | None, error: OSError, then: str = "") -> UserError:
    """Return the error for `size` bytes (None: unknown) that could not be written to `path`; `then` ends it."""
    there = next(parent for parent in path.absolute().parents if parent.exists())  # its own folder may be gone
    free = f"{shutil.disk_usage(there).free:,}"
    room = f"{free} bytes free" if size is None else f"{size:,} bytes needed, {free} free"
    return UserError(field, path, f"could not be written: {error.strerror} ({room}){then}")


NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # such as of a network folder


@contextlib.contextmanager
def folder_lock(field: str, folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone. The system drops the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or it can't be locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(field, folder, "is in use by another run; wait until it ends, or give another folder") from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            said = f"must be on a file system with locks, but can't be locked ({error.strerror}); give another folder"
            raise UserError(field, folder, said) from None
        if (refused := refused_by_system(error)) is None:
            raise
        path = error.filename or folder
        raise UserError(field, path, f"{refused.allowed} ({error.strerror}), or give another folder") from None
    try:
        with _shown_as_held(folder / HELD):
            yield
    finally:
        lock.release()


HELD = ".running"  # beside .lock; `is_locked` tests this file, so it never blocks a process that wants .lock
LOOK_SECONDS = 5  # a test takes microseconds; one that was paused in the middle must not keep a run from starting


@contextlib.contextmanager
def _shown_as_held(path: Path) -> Iterator[None]:
    """Hold the file at `path`, which `is_locked` tests. Only the holder of the folder does this."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + LOOK_SECONDS
        while not _flock(descriptor, fcntl.LOCK_EX) and time.monotonic() < until:
            time.sleep(0.001)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Return whether a process holds `folder_lock` on `folder`. The test takes no lock that a run needs to start."""
    try:
        descriptor = os.open(folder / HELD, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH)  # shared, so that tests don't see each other
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def try_lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock `folder` itself, without a file in it; yield whether that succeeded.

    Unlike `folder_lock`, it leaves nothing in a folder of yours, and a lock that another process holds is no error. On
    a file system without locks it never succeeds, and neither does it on a folder that was just removed or replaced.

    Args:
        folder: what to lock.
        wait: wait until no other process holds the lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            still_there = os.path.samestat(os.fstat(descriptor), folder.stat())
        except OSError:
            yield False
        else:
            yield still_there
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int) -> bool:
    """Take a lock if nobody holds it; return whether it is free. On a file system without locks it always is."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def cache_folder() -> Path:
    """Return the folder for what can be made or downloaded again: $INDRAQUANTUM_CACHE, or ~/.cache/indraquantum.

    Raises:
        UserError: the variable is not set, and there is no home folder.
    """
    if chosen := os.environ.get("INDRAQUANTUM_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "indraquantum"
    except RuntimeError:  # as in a container whose user has no entry in /etc/passwd
        raise UserError(
            "INDRAQUANTUM_CACHE", "nothing", "must name a folder, because there is no home folder"
        ) from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it is fsynced and renamed to `path`; on failure it is removed.

    If `path` is a symbolic link, its target is replaced.
    """
    path, temporary = _with_temporary(path)
    try:
        yield temporary
        _on_disk(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. On success it replaces `path` as a whole; on failure it is removed.

    If `path` is a symbolic link, its target is replaced.
    """
    path, temporary = _with_temporary(path)
    replaced = temporary.with_suffix(".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _on_disk(file)
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        if replaced.exists() and not path.exists():  # interrupted between the two renames
            os.replace(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _with_temporary(path: Path) -> tuple[Path, Path]:
    """Return what `path` leads to, and a temporary path beside that."""
    path = path.resolve()
    return path, path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _on_disk(file: Path) -> None:
    """Fsync `file`, and let others read what a library wrote for its owner alone, as far as the umask allows."""
    file.chmod(file.stat().st_mode | 0o666 & ~_UMASK)
    with open(file, "rb") as opened:
        _fsync(opened.fileno())


def names_aside(*paths: Path) -> list[Path]:
    """Return a free name beside each of `paths` for a file that is set aside: NAME.set-aside-N, with one N for all."""
    numbered = ([path.with_name(f"{path.name}.set-aside-{n}") for path in paths] for n in itertools.count(1))
    return next(names for names in numbered if not any(name.exists() for name in names))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None, also inside dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


SEAL = "manifest_sha256"


def write_manifest_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as `write_json` does, with its own SHA-256 as the last entry."""
    write_json(path, {**value, SEAL: _seal(value)})


def check_manifest_json(field: str, path: Path) -> None:
    """Check every byte of a manifest against the SHA-256 in it.

    Raises:
        UserError: a byte has changed, or there is no SHA-256; `field` is the option to name.
    """
    value = read_json(field, path)
    if not isinstance(value, dict) or SEAL not in value:
        raise UserError(field, path, f"has no {SEAL}: it is damaged, or an earlier version wrote it; make it again")
    value = {name: entry for name, entry in value.items() if name != SEAL}
    expected = json.dumps({**value, SEAL: _seal(value)}, indent=2, ensure_ascii=False) + "\n"
    if path.read_bytes() != expected.encode(errors="backslashreplace"):
        raise UserError(field, path, f"is damaged: its {SEAL} does not match its content")


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace")).hexdigest()


def read_json(field: str, path: Path, at_most: int | None = None) -> Any:
    """Parse the JSON file at `path`, which may have at most `at_most` bytes.

    Raises:
        UserError: the file is missing, too large, not UTF-8 or not JSON; `field` is the option to name.
    """
    try:
        if at_most is not None and path.stat().st_size > at_most:
            raise UserError(field, path, f"must be at most {at_most:,} bytes, not {path.stat().st_size:,}")
        return json.loads(path.read_text(encoding="utf-8"))
    except UserError:  # which is a ValueError
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(field, path, error) from None
    except json.JSONDecodeError as error:
        raise UserError(field, path, f"must be JSON ({error.msg} at line {error.lineno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(field, path, f"must be JSON that can be read ({' '.join(str(error).split())[:80]})") from None


SUMS_NAME = "SHA256SUMS"  # in the format of sha256sum: `sha256sum -c SHA256SUMS` checks a folder without this program
_SUM = re.compile(r"([0-9a-f]{64}) [ *]([^\\\0]+)")


def write_sums(folder: Path) -> None:
    """Write `folder`/SHA256SUMS for all other files of the folder and of the folders in it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in names if name != SUMS_NAME]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Return the checksums in `folder`/SHA256SUMS by the path in the folder; empty if there is no such file."""
    try:
        text = (folder / SUMS_NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = (_SUM.fullmatch(line) for line in text.splitlines())
    return {match[2]: match[1] for match in found if match}


def damaged_file(folder: Path, names: Iterable[str]) -> str | None:
    """Return the first of the files `names` in `folder` that does not match SHA256SUMS; None if all match."""
    sums = read_sums(folder)
    wrong = (name for name in names if name in sums and sha256_of(folder / name) != sums[name])
    return next(wrong, None)


NOT_ITS_SUM = f"is damaged: its SHA-256 is not the one in {SUMS_NAME} (if you changed it on purpose, remove that file)"
