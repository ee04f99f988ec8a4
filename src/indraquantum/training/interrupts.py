"""SIGTERM and SIGINT: the first one asks the run to leave, a second one leaves at once.

    with Interrupts() as interrupts:        # a signal raises Interrupted where it strikes
        with interrupts.deferred():         # ... but here it waits for `check`, so that a step or a save is not cut
            interrupts.check()

Imports nothing heavy: the command line installs it before torch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A signal asked to leave; the process then exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Interrupts:
    """Turns signals into `Interrupted` while it is open; outside the main thread, where none arrive, does nothing."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._at_once = True
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._requested is not None:
            os._exit(128 + number)
        self._requested = number
        if self._at_once:
            raise Interrupted(number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._requested is not None:
            raise Interrupted(self._requested)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for `check`."""
        with self._mode(at_once=False):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, also one that came before, a signal raises where it strikes: for what may be cut anywhere."""
        with self._mode(at_once=True):
            self.check()
            yield

    @contextlib.contextmanager
    def _mode(self, at_once: bool) -> Iterator[None]:
        before, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            self._at_once = before
