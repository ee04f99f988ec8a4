"""Follows the metrics file of a run while it grows, and keeps its curves as a bounded number of points.

A file may have a million lines, and its run may be killed and resumed, which replaces the file by one that is shorter.
So the file is read in parts, each for a limited time, and only what is new is read. After a replacement, reading
continues from a point up to which the bytes are the same.
"""

from __future__ import annotations

import copy
import math
import os
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from indraquantum.errors import UserError
from indraquantum.metrics import FIELDS, Line, raw_lines
from indraquantum.monitor.points import Means, Points
from indraquantum.thresholds import THRESHOLDS

NOT_DRAWN = ("step", "stage", "held_out", "collapse")
COLUMNS = tuple(name for name in FIELDS if name not in NOT_DRAWN)
SMOOTHED = ("loss", "ce", "kd", "kd_estimate", "phase", "magnitude", "grad_norm", "tokens_per_second")
DECAYS = (0.9, 0.99)
SERIES = (
    *COLUMNS,
    *(f"{name}@{decay}" for decay in DECAYS for name in SMOOTHED),
    *(f"{name}_threshold" for name in THRESHOLDS),
)
KINDS = frozenset({float, int, type(None)})
LINES_AT_ONCE = 1000
LINES_BETWEEN_MARKS = 2_000
MOST_EVENTS = 1000
MOST_SOURCES = 32
SEEN_AGAIN = 64  # bytes before the end of what was read that must still be there


class Curves:
    """The curves of the lines taken so far.

    Attributes:
        points: the series in SERIES, a point for each step or stretch of steps.
        sources: the names of the held-out sources.
        held_out: their cross-entropies, nats per token.
        collapse: the steps at which the suspected kinds of collapse changed, with these kinds.
        last: all figures of the last line.
        damaged: how many lines were left out, and `damage` says what is wrong with the first.
    """

    def __init__(self) -> None:
        self.points = Points(len(SERIES))
        self.sources: tuple[str, ...] = ()
        self.held_out = Points(0)
        self.collapse: list[tuple[int, list[str]]] = []
        self.last: dict[str, Any] = {}
        self.damaged, self.damage = 0, ""
        self._means = [Means(decay, len(SMOOTHED)) for decay in DECAYS]
        self._best = {name: float("-inf") for name in THRESHOLDS}

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the values of a series in SERIES, without those that are missing."""
        return _present(self.points, SERIES.index(name))

    def held_out_of(self, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the cross-entropies, nats per token, of a held-out source."""
        return _present(self.held_out, self.sources.index(source))

    def take(self, lines: list[Line], shapes: set[bytes]) -> None:
        """Add lines. Damaged ones are left out and counted."""
        metrics, rows = [], []
        step = self.last.get("step", -1)
        for line in lines:
            try:
                line.check(shapes)
                found = line.parse()
                row = _row(line, found, step)
            except UserError as error:
                self.damaged += 1
                self.damage = self.damage or error.allowed.removesuffix("; remove that line")
                continue
            step = found["step"]
            metrics.append(found)
            rows.append(row)
        if not metrics:
            return
        self.last = metrics[-1]
        self._add(np.array([found["step"] for found in metrics], float), np.array(rows, float))
        self._evaluations([found for found in metrics if found.get("held_out")])
        self._events(metrics)

    def _add(self, steps_n: np.ndarray, values_nS: np.ndarray) -> None:
        smoothed = values_nS[:, [COLUMNS.index(name) for name in SMOOTHED]]
        thresholds = [self._threshold(name, values_nS[:, COLUMNS.index(name)]) for name in THRESHOLDS]
        parts = [values_nS, *(means.take(smoothed) for means in self._means), np.stack(thresholds, axis=1)]
        self.points.add(steps_n, np.concatenate(parts, axis=1))

    def _threshold(self, name: str, values_n: np.ndarray) -> np.ndarray:
        """Return below which value the guard would suspect a collapse at each row; NaN where it would not look."""
        threshold = THRESHOLDS[name]
        best_n = np.fmax.accumulate(np.concatenate([[self._best[name]], values_n]))[1:]
        self._best[name] = float(best_n[-1])
        looked = ~np.isnan(values_n) & (best_n >= threshold.meaningful)
        return np.where(looked, threshold.fraction * best_n, np.nan)

    def _evaluations(self, metrics: list[dict[str, Any]]) -> None:
        if not metrics:
            return
        if not self.sources:
            *sources, last = metrics[0]["held_out"]  # the last one is of all text
            self.sources = (*sources[: MOST_SOURCES - 1], last)
            self.held_out = Points(len(self.sources))
        values = [[found["held_out"].get(name) for name in self.sources] for found in metrics]
        self.held_out.add(np.array([found["step"] for found in metrics], float), np.array(values, float))

    def _events(self, metrics: list[dict[str, Any]]) -> None:
        for found in metrics:
            looked = found.get("context_divergence") is not None
            kinds = found.get("collapse") or []
            before = self.collapse[-1][1] if self.collapse else []
            if looked and kinds != before and len(self.collapse) < MOST_EVENTS:
                self.collapse.append((found["step"], kinds))


def _present(points: Points, column: int) -> tuple[np.ndarray, np.ndarray]:
    steps, values = points.since(0)
    there = ~np.isnan(values[:, column])
    return steps[there], values[there, column]


def read_curves(path: Path) -> Curves:
    """Return the curves of a whole metrics file. Half a million lines take some ten seconds.

    Raises:
        OSError: the file can't be read.
    """
    follower = Follower(path)
    while follower.fraction < 1:
        follower.read(60)
    return follower.curves


def _row(line: Line, found: dict[str, Any], before: int) -> list[float | None]:
    """Return the figures of a line in the order of COLUMNS.

    Raises:
        UserError: one of them is no figure, or the step is not above `before`.
    """
    step = found.get("step")
    if type(step) is not int or not before < step < 2**53:
        raise line.damaged("has no step above that of the line before")
    row = [found.get(name) for name in COLUMNS]
    held_out, kinds = found.get("held_out") or {}, found.get("collapse") or []
    if not isinstance(held_out, dict) or not isinstance(kinds, list):
        raise line.damaged("has no valid figures for held_out")
    figures = [*row, *held_out.values()]
    if not KINDS.issuperset(map(type, figures)) or not _fit(figures):
        raise line.damaged("has a value that is no figure")
    if not all(isinstance(kind, str) for kind in kinds):
        raise line.damaged("has kinds of collapse that are no names")
    return row


def _fit(figures: list[float | None]) -> bool:
    """Return whether numbers fit into a float: an integer of JSON may have any number of digits."""
    try:
        return math.isfinite(sum(filter(None, figures)))
    except OverflowError:
        return False


class _Mark(NamedTuple):
    """A point of a file from which reading can continue."""

    offset: int
    number: int  # of the last line before it
    crc: int  # of all bytes before it
    end: bytes  # the last bytes before it
    curves: Curves


class Follower:
    """Reads what a metrics file has gained since the last time.

    Attributes:
        curves: the curves so far.
        generation: how often the curves were begun again, because the file was replaced.
        fraction: which part of the file is read, from 0 to 1.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._shapes = path, set[bytes]()
        self._seen: tuple[int, ...] = ()  # of the file at the last reading
        self._marks: list[_Mark] = []
        self.generation, self.fraction = 0, 0.0
        self._begin(_Mark(0, 0, 0, b"", Curves()))

    def _begin(self, mark: _Mark) -> None:
        self._offset, self._number, self._crc, self._end, self.curves = mark._replace(curves=copy.deepcopy(mark.curves))

    def _mark(self) -> _Mark:
        return _Mark(self._offset, self._number, self._crc, self._end, copy.deepcopy(self.curves))

    def read(self, seconds: float) -> None:
        """Take new lines for at most about `seconds`.

        Raises:
            OSError: the file can't be read.
        """
        until = time.monotonic() + seconds
        with self._path.open("rb") as file:
            about = file_state(file)
            if about == self._seen and self.fraction == 1:
                return
            self._find_place(file)
            file.seek(self._offset)
            lines, whole = raw_lines(file, self._path, self._number), False
            while time.monotonic() < until and not whole:
                taken = list(islice(lines, LINES_AT_ONCE))
                self._take(taken)
                whole = len(taken) < LINES_AT_ONCE
            size = file_state(file)[0]
            self.fraction = 1.0 if whole else min(0.999, self._offset / max(1, size))
            self._seen = about

    def _take(self, lines: list[Line]) -> None:
        if not lines:
            return
        self.curves.take(lines, self._shapes)
        content = b"".join(line.content for line in lines)
        self._offset, self._number = self._offset + len(content), lines[-1].number
        self._crc, self._end = zlib.crc32(content, self._crc), (self._end + content)[-SEEN_AGAIN:]
        if self._number - (self._marks[-1].number if self._marks else 0) >= LINES_BETWEEN_MARKS:
            self._marks = [*self._marks[-1:], self._mark()]  # a resumed run repeats far fewer lines than two marks

    def _find_place(self, file: BinaryIO) -> None:
        """If the file was replaced, go back to the last mark up to which it is the same, or to its beginning."""
        file.seek(self._offset - len(self._end))
        if file.read(len(self._end)) == self._end:
            return
        self._marks = [mark for mark in self._marks if _crc_of(file, mark.offset) == mark.crc]
        self._begin(self._marks[-1] if self._marks else _Mark(0, 0, 0, b"", Curves()))
        self.generation += 1


def file_state(file: BinaryIO) -> tuple[int, int, int]:
    """Return size, time of the last change and inode of an open file."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns, about.st_ino


def _crc_of(file: BinaryIO, size: int) -> int | None:
    """Return the CRC-32 of the first `size` bytes; None if there are fewer."""
    file.seek(0)
    crc = 0
    while size:
        part = file.read(min(size, 1 << 20))
        if not part:
            return None
        crc, size = zlib.crc32(part, crc), size - len(part)
    return crc
