"""Captures one shard at a time: the part of `indra capture` that runs in one process or in many.

A shard depends only on the manifest's identity, its `precision` and `batch_rows`, and on `--threads`. Batches never
cross the ends of a shard, and the shard's journal keeps what a stopped worker has captured. So any worker can capture
any shard, even twice, with the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from indraquantum.config import CaptureSettings
from indraquantum.progress import duration, tell, warn
from indraquantum.teacher.journal import Journal, Record
from indraquantum.teacher.manifest import Manifest, ShardEntry
from indraquantum.teacher.sampling import PositionSignals
from indraquantum.teacher.shard import entry_bits, write_shard

if TYPE_CHECKING:
    from indraquantum.data.prepared import PreparedDataset


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
    """What every worker needs. It is small, so that it can be sent to another process."""

    settings: CaptureSettings
    folder: Path
    manifest: Manifest  # its identity and batch_rows are used; the settings have its precision
    positions: int  # of all jobs, for the estimate
    positions_at_once: int  # at most, of the shards captured at the same time, whose journals are on the disk
    first_file: str  # the shard whose first batch is timed for the estimate
    threads: int = 0  # of torch in each of several workers; 0 leaves the choice to --threads and to torch


Progressed = Callable[[int, int], object]  # hears of positions that are done, and how many of them were done before


class ShardResult(NamedTuple):
    """A shard that is in the folder, but not yet in the manifest."""

    entry: ShardEntry
    positions_asked: int  # without those in the journal
    packed: bool | None  # False: the teacher mixes the documents of a row; None: it was not asked


class Asker(Protocol):
    """A source of a teacher's distributions."""

    precision: str
    packed: bool | None

    def signals(self, split: str, rows: np.ndarray) -> PositionSignals:
        """Return the signals of all real positions of these rows of a split, in their order."""

    def close(self) -> None:
        """Release what it holds."""


class ShardWorker:
    """Captures shards. The teacher is loaded only when it is needed."""

    def __init__(self, plan: Plan, dataset: PreparedDataset, load: Callable[[], Asker], progress: Progressed) -> None:
        """Take the plan, the dataset, a function that loads the teacher, and one that hears of positions done."""
        self._plan, self._dataset, self._load, self._progress = plan, dataset, load, progress
        self._asker: Asker | None = None

    @property
    def asker(self) -> Asker:
        """The loaded teacher."""
        if self._asker is None:
            self._asker = self._load()
            if self._asker.packed is False:
                warn(
                    "capture: this teacher does not keep the documents of a row apart, so it is asked about one "
                    "document at a time, which is slower"
                )
        return self._asker

    def close(self) -> None:
        """Release the teacher."""
        if self._asker is not None:
            self._asker.close()

    def shard(self, job: Job) -> ShardResult:
        """Capture one shard, except for the batches in its journal."""
        folder = self._plan.folder
        with contextlib.closing(Journal(folder, job.file, job.first_row, job.last_row)) as journal:
            records = journal.records
            kept = sum(len(record.signals.entropy_N) for record in records)
            self._progress(kept, kept)
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
                self._progress(len(record.signals.entropy_N), 0)
            columns = zip(*(record.signals for record in records), strict=True)
            whole = PositionSignals(*(None if c[0] is None else np.concatenate(c) for c in columns))
            precision = "+".join(sorted({record.precision for record in records}))
            entry = write_shard(folder, job.file, job.split, job.rows, whole, self._plan.manifest, precision)
        return ShardResult(entry, entry.positions - kept, self._asker.packed if self._asker else None)

    def _announce(self, part: PositionSignals, seconds: float, journal_bytes: int) -> None:
        """Print an estimate of time and space from the first batch. Journals are removed with their shards' writing."""
        positions, total = len(part.entropy_N), self._plan.positions
        time_left = duration(seconds / positions * total / self._plan.settings.workers)
        stays = (7 + len(part.ids_M) / positions * entry_bits(self._plan.manifest).width / 8) * total
        most = stays + journal_bytes / positions * self._plan.positions_at_once
        size = f"{most / 1e6:,.1f} MB on the disk, of which {stays / 1e6:,.1f} MB remain at the end"
        tell(f"capture: {total:,} positions will take about {time_left} and {size}")
