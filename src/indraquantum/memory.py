"""The main memory of this process, on Linux with /proc, and its peak also on macOS.

psutil gives no peak that can be restarted, so these few lines read /proc themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROC = Path("/proc/self")


def held_bytes() -> int | None:
    """Return the bytes that this process holds now; None if the system does not tell."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """Return the most bytes that this process has held, since `restart_peak` if that worked; None if unknown."""
    peak = _status("VmHWM")
    if peak is None and sys.platform == "darwin":
        import resource

        # In bytes. On Linux it is in KiB, and may be the peak of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def restart_peak() -> bool:
    """Restart the peak at what is held now; return whether the system can do it."""
    try:
        (PROC / "clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    """Return a field of this process's status in bytes; None if there is no such field or file."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
