"""The temporary folder of `indra prepare`, and the removal of what killed preparations left behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from indraquantum.files import try_lock

PREFIX = ".prepare-"
OF_PROCESS = re.compile(rf"{re.escape(PREFIX)}(\d+)-.*")


@contextlib.contextmanager
def temporary_folder(parent: Path, outputs: Sequence[Path]) -> Iterator[Path]:
    """Yield a new folder inside `parent` and remove it at the end; first remove what dead processes left.

    A process locks its folder for as long as it lives, and the system drops the lock when the process ends. So a
    process number that is in use again misleads nobody, and neither does a process that was paused.

    Args:
        parent: Where the folder goes.
        outputs: What `indra prepare` writes through files.py. Temporary files and folders of dead processes beside
            these are removed too. An output that was moved aside and never replaced is put back.
    """
    # The parent is locked first, so that nobody takes a new folder that is not locked yet for a dead process's.
    with try_lock(parent, wait=True) as locked:
        if locked:
            _clear(parent, outputs)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{PREFIX}{os.getpid()}-"))
        own = contextlib.ExitStack()
        own.enter_context(try_lock(folder))
    with own:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear(parent: Path, outputs: Sequence[Path]) -> None:
    alive = set()
    for folder in parent.glob(f"{PREFIX}*"):
        with try_lock(folder) as dead:
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
