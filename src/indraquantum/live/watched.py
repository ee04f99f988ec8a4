"""The runs below a folder of logs, as the page asks for them. Several tabs share what was read."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from indraquantum.files import HELD, is_locked, without_nan
from indraquantum.live.server import Refused
from indraquantum.metrics import RECORD_NAME
from indraquantum.monitor.curves import SERIES, Curves, Follower
from indraquantum.monitor.overview import Overview, overview_of
from indraquantum.monitor.runs import metrics_files, name_of

SECONDS_BETWEEN_LISTS = 0.8
SECONDS_TO_READ = 0.2  # of metrics for one answer; the page asks for the rest at once
MOST_FOLLOWED = 128  # runs whose curves stay in memory, about 0.5 MB each


class Watched:
    """Finds the runs below `root`, and reads what they gain.

    A run is asked for by its id, a hash of its name. So no name from a request becomes a path, and a name may have
    bytes that no URL can carry.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock, self._reading, self._listed = threading.Lock(), threading.Lock(), 0.0
        self._paths: dict[str, Path] = {}
        self._overviews: dict[str, tuple[Any, Overview]] = {}
        self._followers: OrderedDict[str, tuple[Follower, threading.Lock]] = OrderedDict()

    def paths(self) -> dict[str, Path]:
        """Return the metrics files of all runs by id. The folder is searched again about every second."""
        with self._lock:
            if time.monotonic() - self._listed > SECONDS_BETWEEN_LISTS:
                self._paths = {_id_of(path): path for path in metrics_files(self.root)}
                self._listed = time.monotonic()
            return self._paths

    def path(self, run: str) -> Path:
        """Return the metrics file of a run.

        Raises:
            Refused: there is no such run.
        """
        path = self.paths().get(run)
        if path is None:
            raise Refused(404, "there is no such run; it may have been removed")
        return path

    def overviews(self) -> list[dict[str, Any]]:
        """Return what the list says about each run."""
        return [{"id": run, **without_nan(asdict(self._overview(run, path)))} for run, path in self.paths().items()]

    def _overview(self, run: str, path: Path) -> Overview:
        try:
            return self._known_overview(run, path)
        except OSError as error:  # as of a drive of the network that is gone
            return Overview(name_of(path, self.root), "damaged", f"can't be read ({error.strerror})")

    def _known_overview(self, run: str, path: Path) -> Overview:
        now = _fingerprint(path)
        before, overview = self._overviews.get(run, (None, None))
        if overview is None or now != before:
            overview = overview_of(path, self.root)
            self._overviews[run] = now, overview
        changed = now[0][1] / 1e9 if now[0] else time.time()
        return replace(overview, seconds_since=max(0.0, time.time() - changed))

    def curves(self, run: str, key: str, first: int, series: list[str]) -> dict[str, Any]:
        """Return the points that a page lacks, after reading what is new.

        Args:
            run: the id of the run.
            key: what the page got with the last answer; empty at the first time.
            first: how many whole stretches the page has.
            series: the names of the series; unknown ones are left out.
        """
        path = self.path(run)
        follower, lock = self._follower(run, path)
        with lock:
            with self._reading:  # one after the other: threads would only slow each other down
                follower.read(SECONDS_TO_READ)
            now = f"{follower.generation}.{follower.curves.points.every}.{follower.curves.held_out.every}"
            first = first if key == now and 0 <= first <= follower.curves.points.complete else 0
            return {
                "key": now,
                "first": first,
                "fraction": follower.fraction,
                **_answer(follower.curves, first, series),
            }

    def _follower(self, run: str, path: Path) -> tuple[Follower, threading.Lock]:
        with self._lock:
            if run not in self._followers:
                self._followers[run] = Follower(path), threading.Lock()
            self._followers.move_to_end(run)
            while len(self._followers) > MOST_FOLLOWED:
                self._followers.popitem(last=False)
            return self._followers[run]


def _id_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _fingerprint(path: Path) -> tuple[Any, ...]:
    """Return what changes when the overview of a run changes."""

    def about(file: Path) -> tuple[int, int, int] | None:
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    folder = path.parent
    return about(path), about(folder / RECORD_NAME), (folder / HELD).exists(), is_locked(folder)


def _answer(curves: Curves, first: int, series: list[str]) -> dict[str, Any]:
    steps, values = curves.points.since(first)
    wanted = [name for name in dict.fromkeys(series) if name in SERIES]
    columns = {name: values[:, SERIES.index(name)] for name in wanted}
    held_out_steps, held_out = curves.held_out.since(0)
    return {
        "complete": curves.points.complete,
        "every": curves.points.every,
        "steps": steps.astype(int).tolist(),
        "series": {name: _short(column) for name, column in columns.items() if not np.isnan(column).all()},
        "held_out": {
            "steps": held_out_steps.astype(int).tolist(),
            "sources": {name: _short(held_out[:, place]) for place, name in enumerate(curves.sources)},
        },
        "collapse": curves.collapse,
        "last": without_nan({name: curves.last.get(name) for name in ("step", "stage", "epoch", "tokens")}),
        "damaged": curves.damaged,
        "damage": curves.damage,
    }


def _short(values: np.ndarray) -> list[float | None]:
    """Return the values with 7 digits, which a screen can't tell from all; None for NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (6 - np.floor(np.log10(np.abs(values))))
        rounded = np.where(np.isfinite(scale), np.round(values * scale) / scale, values)
    return [None if value != value else value for value in rounded.tolist()]
