"""Main memory that this process holds, where the system says so: Linux with /proc, and macOS for the peak."""

from __future__ import annotations

import sys
from pathlib import Path

PROC = Path("/proc/self")


def held_bytes() -> int | None:
    """Bytes that this process holds now; None where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most bytes that this process has held, since `restart_peak` where that worked; None where nothing says."""
    peak = _status("VmHWM")
    if peak is None and sys.platform == "darwin":
        import resource

        # In bytes, unlike Linux's, which may also be the peak of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def restart_peak() -> bool:
    """Let the peak begin again at what is held now; whether the system can."""
    try:
        (PROC / "clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    """A field of this process's status, in bytes; None where there is no such field or no such file."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
