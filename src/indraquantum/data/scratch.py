"""The folder for what a preparation needs for a while, and the clearing of what killed preparations left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFIX = ".prepare-"
OF_PROCESS = re.compile(rf"{re.escape(PREFIX)}(\d+)-.*")


@contextlib.contextmanager
def scratch_folder(parent: Path, outputs: Sequence[Path]) -> Iterator[Path]:
    """Yield a new folder inside `parent` that goes at the end; first remove what dead processes left.

    A process locks its folder for as long as it lives, and the system drops the lock however it ends. So neither a
    number that another process has got since nor a stopped process misleads.

    Args:
        parent: Where the folder goes.
        outputs: What this process and its predecessors write through files.py: their temporary files and folders that
            belong to dead processes go too, and an output that was moved aside and not replaced comes back.
    """
    with _lock(
        parent, wait=True
    ) as alone:  # so that nobody takes a folder that is new and not locked yet for a dead one
        if alone:
            _clear(parent, outputs)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{PREFIX}{os.getpid()}-"))
        own = contextlib.ExitStack()
        own.enter_context(_lock(folder))
    with own:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear(parent: Path, outputs: Sequence[Path]) -> None:
    alive = set()
    for folder in parent.glob(f"{PREFIX}*"):
        with _lock(folder) as dead:
            if dead:
                shutil.rmtree(folder, ignore_errors=True)
            elif of_process := OF_PROCESS.fullmatch(folder.name):
                alive.add(of_process[1])
    for output in (output.resolve() for output in outputs):
        for left in output.parent.glob(f".{output.name}.*"):
            number, kind = (*left.name.removeprefix(f".{output.name}.").split("."), "")[:2]
            if kind not in ("tmp", "old") or not number.isdecimal() or number in alive:
                continue
            if kind == "old" and not output.exists():
                os.replace(left, output)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a folder while the context lasts; yield whether that succeeded. A file system without locks never does."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
