"""What a long command says while it works: a bar on a terminal, and a line now and then where no bar is seen.

    with Progress("capture", total=positions, unit="tokens") as progress:
        progress.update(4096)

A log file, a pipe or `nohup` gets the lines: how far the work is, its figures, how fast it is and the time left.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
NOBODY_READS = (errno.EPIPE, errno.EIO)  # the pipe's reader, or the terminal, is gone


def tell(line: str) -> None:
    """Print `line`, above a bar if there is one.

    Where nobody can read it any more, as after a dropped connection, this counts as a SIGHUP: what comes after it is
    not printed, and the command leaves as it does for that signal.
    """
    try:
        tqdm.write(line)
    except OSError as error:
        if error.errno not in NOBODY_READS or signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        signal.raise_signal(signal.SIGHUP)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """How far a piece of work is.

    Args:
        name: of the work.
        total: units of all of it; None where it is not known.
        unit: what is counted, in the plural.
        done: units that were done before.
        silent: say nothing, as a process does that is not the first of a run.
    """

    def __init__(self, name: str, total: int | None, unit: str, *, done: int = 0, silent: bool = False) -> None:
        # disable=None: no bar where there is no terminal
        self._bar = tqdm(
            total=total, initial=done, desc=name, unit=f" {unit}", disable=silent or None,
            unit_scale=total is None or total > 100_000,
        )  # fmt: skip
        self._has_lines = not silent and (self._bar.disable or not sys.stdout.isatty())
        self._name, self._total, self._unit = name, total, unit
        self._done = self._first = done
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, count: int = 1, figures: str = "") -> None:
        """Take in that `count` more units are done; `figures` are what to show beside them."""
        self._done += count
        self._bar.update(count)
        if figures:
            self._bar.set_postfix_str(figures)
        now = time.monotonic()
        if self._has_lines and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            tell(self._line(figures, now - self._began))

    def _line(self, figures: str, seconds: float) -> str:
        here = self._done - self._first  # what was done before says nothing of the speed
        whole = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._name}: {self._done:,}{whole} {self._unit}"]
        if figures:
            parts.append(figures)
        if here and seconds:
            rate = here / seconds
            parts.append(f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s")
            if self._total is not None:
                parts.append(f"{duration(max(0, self._total - self._done) / rate)} left")
        return ", ".join(parts)
