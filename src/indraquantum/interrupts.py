"""SIGTERM, SIGINT and SIGHUP: the first one asks the run to stop, a second SIGTERM or SIGINT ends it at once.

    with Interrupts() as interrupts:        # a signal raises Interrupted at once
        with interrupts.deferred():         # here it waits for `check`, so that it can't interrupt a step or a save
            interrupts.check()

The processes of one run end together. Once they are joined, a signal to any of them waits for the next `check`, which
all of them call.

A terminal that closes sends SIGHUP more than once (the shell to its jobs, then the kernel). So a SIGHUP never counts as
a second signal. If the process was started with a signal ignored, as `nohup` does with SIGHUP, it stays ignored.

This module imports nothing heavy, because the command line uses it before torch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Return the signals in `numbers` that this process does not ignore."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupted(SystemExit):
    """A signal asked the process to end. Its exit status is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number, self.name = number, signal.Signals(number).name

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        """Support pickling, so that it reaches the other processes of a run."""
        return type(self), (self.number,)


class Interrupts:
    """Turns signals into `Interrupted` while it is open. Outside the main thread, where none arrive, it is idle."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._urged = False  # whether a SIGTERM or SIGINT came, so that a second one ends the process at once
        self._at_once = True
        self._largest: Callable[[int], int] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in heeded(*SIGNALS)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGHUP:
            if self._urged:
                os._exit(128 + number)
            self._urged = True
        if self._requested is not None:
            return
        self._requested = number
        if self._at_once:
            raise Interrupted(number)

    def join(self, largest: Callable[[int], int]) -> None:
        """End together with other processes, which `check` equally often. `largest` returns their largest number."""
        self._largest, self._at_once = largest, False

    def check(self) -> None:
        """Raise Interrupted if a signal has come to this process or to one that it is joined with."""
        requested = self._requested or 0
        if self._largest is not None:
            requested = self._largest(requested)
        if requested:
            raise Interrupted(requested)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for `check`."""
        with self._mode(at_once=False):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises at once, also one that came before. This is for work that may stop anywhere.

        Joined processes check for signals only on entry, so the work inside should call `check` now and then.
        """
        with self._mode(at_once=self._largest is None):
            self.check()
            yield

    @contextlib.contextmanager
    def _mode(self, at_once: bool) -> Iterator[None]:
        before, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            self._at_once = before
