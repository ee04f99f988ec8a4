"""What torchrun says to a process that it starts. It imports nothing heavy, because the command line asks it too."""

from __future__ import annotations

import os


def launched_processes() -> int:
    """Return how many processes torchrun, or a launcher like it, started for this run; 1 if this one is alone.

    A WORLD_SIZE alone may be left over from something else: without a RANK, a process has no place among others.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
