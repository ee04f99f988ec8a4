"""Shows the progress of long work: a bar in a terminal, and a line from time to time where there is no terminal.

    with Progress("capture", total=positions, unit="tokens") as progress:
        progress.update(4096)

The lines go to the logger `indraquantum`. The command line prints them: a log file, a pipe or `nohup` gets how far the
work is, its figures, its speed and the time left. A program that uses the package decides for itself, as with any
library: by default it sees warnings, and bars where stderr is a terminal. `logging.basicConfig(level=logging.INFO)`
shows the lines, and `logging.getLogger("indraquantum").setLevel(logging.ERROR)` silences everything. tqdm draws the
bar; it has no such lines, so they are written here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from indraquantum.errors import options_named, worded

SECONDS_BETWEEN_LINES = 30.0
# A short bar and no elapsed time leave room for figures in a terminal of 80 columns.
BAR = "{desc}: {percentage:3.0f}%|{bar:6}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
NOBODY_READS = (errno.EPIPE, errno.EIO)  # the reader of the pipe, or the terminal, is gone
_LOGGER = logging.getLogger("indraquantum")


def tell(line: str) -> None:
    """Log `line` for information."""
    _LOGGER.info("%s", worded(line))


def warn(line: str) -> None:
    """Log `line` as a warning."""
    _LOGGER.warning("%s", worded(line))


class _Printer(logging.Handler):
    """Prints lines above a bar if there is one: warnings to stderr, the others to stdout.

    If nobody can read stdout any more, as after a lost connection, this counts as a SIGHUP: nothing more is printed,
    and the command ends as it does for that signal.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # here, because a command that prints nothing this way need not wait for its import

        if record.levelno >= logging.WARNING:
            tqdm.write(record.getMessage(), file=sys.stderr)
            return
        try:
            tqdm.write(record.getMessage())
        except OSError as error:
            if error.errno not in NOBODY_READS or signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                raise
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
            signal.raise_signal(signal.SIGHUP)


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Inside, this process speaks as a command does: lines are printed, and messages name options."""
    handlers, level, propagate = _LOGGER.handlers, _LOGGER.level, _LOGGER.propagate
    _LOGGER.handlers, _LOGGER.propagate = [_Printer()], False
    _LOGGER.setLevel(logging.INFO)
    try:
        with options_named():
            yield
    finally:
        _LOGGER.handlers, _LOGGER.propagate = handlers, propagate
        _LOGGER.setLevel(level)


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, as precisely as it matters."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Progress:
    """The progress of a piece of work.

    Args:
        name: the name of the work.
        total: the number of units of all of it; None if it is not known.
        unit: the name of a unit, in the plural.
        done: units that were done before.
        silent: print nothing, for processes other than the first of a run.
    """

    def __init__(self, name: str, total: int | None, unit: str, *, done: int = 0, silent: bool = False) -> None:
        from tqdm import tqdm

        silent = silent or not _LOGGER.isEnabledFor(logging.WARNING)
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

    def update(self, count: int = 1, figures: str = "", short: str = "", *, before: int = 0) -> None:
        """Count `count` more units as done.

        Args:
            count: how many.
            figures: what lines show beside them.
            short: what a bar shows, with a speed of its own and the least important at the end; by default `figures`.
            before: how many of them were done before this run, and don't count for the speed.
        """
        self._done += count
        self._first += before
        if short:
            self._bar.bar_format = BAR
        if figures or short:
            self._bar.set_postfix_str(short or figures, refresh=False)
        if before and not self._bar.disable:
            for counter in ("initial", "n", "last_print_n"):
                setattr(self._bar, counter, getattr(self._bar, counter) + before)
        self._bar.update(count - before)
        now = time.monotonic()
        if self._has_lines and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            tell(self._line(figures, now - self._began))

    def _line(self, figures: str, seconds: float) -> str:
        here = self._done - self._first  # units that were done before don't count for the speed
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
