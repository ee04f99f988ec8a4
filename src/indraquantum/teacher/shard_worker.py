"""Captures one shard at a time: the part of `indra capture` that runs in one process or in many.

A shard is a pure function of the manifest's identity, of its `batch_rows` and of `--threads`; batches never cross a
shard's ends, and what a stopped worker was told is in the shard's journal. So any worker may do any shard, and do it
again, and the bytes are the same.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from indraquantum.config import CaptureSettings
from indraquantum.teacher.journal import Journal, Record
from indraquantum.teacher.manifest import Manifest, ShardEntry
from indraquantum.teacher.sampling import PositionSignals
from indraquantum.teacher.signals import entry_bits, write_shard

if TYPE_CHECKING:
    from indraquantum.data.dataset import PreparedDataset


class Job(NamedTuple):
    """A shard to capture."""

    split: str
    number: int
    first_row: int
    last_row: int  # one past

    @property
    def rows(self) -> tuple[int, int]:
        """First row and the one past the last."""
        return self.first_row, self.last_row

    @property
    def file(self) -> str:
        """The shard's name."""
        return f"{self.split}-{self.number:06d}.safetensors"


@dataclass(frozen=True)
class Plan:
    """What every worker needs to know; small, so that it can be sent to another process."""

    settings: CaptureSettings
    folder: Path
    manifest: Manifest  # for its identity and batch_rows
    positions: int  # of all jobs, for the estimate
    positions_at_once: int  # of the shards that are under way at the same time, at most: their journals lie on the disk
    first_file: str  # the shard whose first batch makes the estimate


class ShardResult(NamedTuple):
    """A shard that lies in the folder, not yet in the manifest."""

    entry: ShardEntry
    positions_asked: int  # without those that the journal knew
    packed: bool | None  # False: the teacher leaks across documents; None: it was not asked


class Asker(Protocol):
    """Something that knows a teacher's distributions."""

    precision: str
    packed: bool | None

    def signals(self, split: str, rows: np.ndarray) -> PositionSignals:
        """The signals of all real positions of these rows of a split, in their order."""

    def close(self) -> None:
        """Let go of what it holds."""


class ShardWorker:
    """Captures shards; the teacher is loaded when the first question is asked, not before."""

    def __init__(
        self, plan: Plan, dataset: PreparedDataset, load: Callable[[], Asker], progress: Callable[[int], object]
    ) -> None:
        """Take the plan, the dataset, what gives the teacher, and what is told of positions as they are done."""
        self._plan, self._dataset, self._load, self._progress = plan, dataset, load, progress
        self._asker: Asker | None = None

    @property
    def asker(self) -> Asker:
        """The teacher, loaded."""
        if self._asker is None:
            self._asker = self._load()
            if self._asker.packed is False:
                print(
                    "capture: in rows of several documents this teacher does not answer as for each document alone; "
                    "asking one document at a time, which is slower",
                    file=sys.stderr,
                )
        return self._asker

    def close(self) -> None:
        """Let go of the teacher."""
        if self._asker is not None:
            self._asker.close()

    def shard(self, job: Job) -> ShardResult:
        """Capture one shard; what its journal knows is not asked again."""
        folder = self._plan.folder
        with contextlib.closing(Journal(folder, job.file, job.first_row, job.last_row)) as journal:
            records = journal.records
            kept = sum(len(record.signals.entropy_N) for record in records)
            self._progress(kept)
            first = records[-1].last_row if records else job.first_row
            step = self._plan.manifest.batch_rows
            for begin in range(first, job.last_row, step):
                asker, began = self.asker, time.perf_counter()
                rows = np.arange(begin, min(begin + step, job.last_row))
                record = Record(begin, int(rows[-1]) + 1, asker.precision, asker.signals(job.split, rows))
                seconds, written = time.perf_counter() - began, journal.append(record)
                if job.file == self._plan.first_file and begin == job.first_row:
                    self._announce(record.signals, seconds, written)
                records.append(record)
                self._progress(len(record.signals.entropy_N))
            columns = zip(*(record.signals for record in records), strict=True)
            whole = PositionSignals(*(None if c[0] is None else np.concatenate(c) for c in columns))
            precision = "+".join(sorted({record.precision for record in records}))
            entry = write_shard(folder, job.file, job.split, job.rows, whole, self._plan.manifest, precision)
        return ShardResult(entry, entry.positions - kept, self._asker.packed if self._asker else None)

    def _announce(self, part: PositionSignals, seconds: float, journal_bytes: int) -> None:
        """Say what lies ahead, from the first batch; journals go when their shards are written."""
        positions, total = len(part.entropy_N), self._plan.positions
        hours = seconds / positions * total / 3600 / self._plan.settings.workers
        stays = (7 + len(part.ids_M) / positions * entry_bits(self._plan.manifest).width / 8) * total
        most = stays + journal_bytes / positions * self._plan.positions_at_once
        size = f"{most / 1e6:,.1f} MB on the disk, of which {stays / 1e6:,.1f} MB stay"
        print(f"capture: {total:,} positions, about {hours:.3g} hours and {size}", file=sys.stderr)
