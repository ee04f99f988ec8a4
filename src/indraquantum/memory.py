"""The memory of this process: what it holds, its peak, and what to do if it does not suffice.

What it holds is known on Linux with /proc, the peak also on macOS. psutil gives no peak that can be restarted, so these
few lines read /proc themselves.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from indraquantum.errors import OutOfMemory

PROC = Path("/proc/self")
# For CUDA, torch has a class of its own. For others it raises a RuntimeError: c10/core/impl/alloc_cpu.cpp and
# ATen/mps/MPSAllocator.mm.
_LACKS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that the main memory or the memory of a device does not suffice."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LACKS)


@contextlib.contextmanager
def memory_needed(field: str, value: object, allowed: str) -> Iterator[None]:
    """Inside, a lack of memory becomes an error that says what to do.

    Args:
        field: the option to change.
        value: its value.
        allowed: what it must be.

    Raises:
        OutOfMemory: the memory does not suffice.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(field, value, allowed) from None


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
