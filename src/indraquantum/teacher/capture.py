"""Asks a teacher once over all prepared rows and stores its signals: `indra capture`.

Work goes shard by shard, held-out rows first, then the training rows' shards in random order, so that a capture that
stops early has seen a fair sample. A shard is a pure function of the identity in the manifest; what a stopped
capture finished is verified and kept, and the teacher is not asked for it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indraquantum.config import CaptureSettings
from indraquantum.errors import UserError
from indraquantum.files import make_folder, sha256_of
from indraquantum.teacher.manifest import (
    MANIFEST_NAME,
    Identity,
    Manifest,
    ShardEntry,
    Statistics,
    read_manifest,
    statistics_of,
    write_manifest,
)
from indraquantum.teacher.sampling import PositionSignals, position_signals, row_uniforms
from indraquantum.teacher.signals import entry_bits, write_shard
from indraquantum.teacher.teacher_model import Teacher, TeacherFiles, check_tokenizer, find_teacher, load_teacher

if TYPE_CHECKING:
    from tqdm import tqdm

    from indraquantum.data.dataset import PreparedDataset, Split

SHARD_POSITIONS = 65_536  # about 3 MB; as much as a kill can lose
_OPTIONS = {
    "teacher_sha256": "--teacher",
    "tokenizer_sha256": "--data",
    "dataset_sha256": "--data",
    "vocabulary_size": "--data",
    "temperature": "--temperature",
    "draws": "--draws",
    "seed": "--seed",
    "kind": "--output",
}


class Job(NamedTuple):
    """A shard to capture."""

    split: str
    number: int
    first_row: int
    last_row: int  # one past

    @property
    def file(self) -> str:
        """The shard's name."""
        return f"{self.split}-{self.number:06d}.safetensors"


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did."""

    output: Path
    teacher: str
    statistics: Statistics  # of all signals there, not of this run alone
    coverage: dict[str, float]  # fraction of each split's rows that has signals
    bytes: int  # of all shards
    positions_asked: int  # by this run
    positions_kept: int  # found finished
    seconds: float  # asking and storing, without loading the teacher
    packed: bool | None  # False: the teacher leaks across documents and was asked one at a time; None: not asked

    @property
    def tokens_per_second(self) -> float:
        """Real positions asked per second."""
        return self.positions_asked / self.seconds if self.seconds else 0.0


def capture(
    settings: CaptureSettings, dataset: PreparedDataset | None = None, shard_positions: int = SHARD_POSITIONS
) -> CaptureReport:
    """Capture a teacher's signals, or go on with a capture that was stopped.

    Args:
        settings: the command's options.
        dataset: `settings.data` if it is open already.
        shard_positions: positions of a shard, about; a capture that goes on keeps its own.

    Returns:
        What was done and what the signals are like.

    Raises:
        UserError: a wrong teacher or dataset, or signals in the output folder that are not those of these settings.
    """
    from indraquantum.device import choose_device

    device = choose_device(settings)
    files = find_teacher("--teacher", settings.teacher)
    if dataset is None:
        from indraquantum.data.dataset import open_dataset

        # A pickle carries no tokenizer; the teacher's is the only one that may serve.
        tokenizer = str(files.folder) if settings.data.is_file() else None
        dataset = open_dataset("--data", settings.data, tokenizer, verify=True)
    check_tokenizer(files, dataset)
    manifest = _begin_or_continue(settings, files, dataset, shard_positions)
    folder = make_folder("--output", settings.output)
    with _only_writer(folder):
        manifest = _verified(folder, manifest)
        jobs = _jobs(dataset, manifest)
        kept = manifest.statistics.positions
        packed, seconds = None, 0.0
        if jobs:
            teacher = load_teacher(files, dataset, device)
            packed = teacher.packed
            began = time.perf_counter()
            manifest = _Run(settings, dataset, teacher, folder).shards(jobs, manifest)
            seconds = time.perf_counter() - began
    return CaptureReport(
        output=folder,
        teacher=settings.teacher,
        statistics=manifest.statistics,
        coverage=_coverage(dataset, manifest),
        bytes=sum(shard.bytes for shard in manifest.shards),
        positions_asked=manifest.statistics.positions - kept,
        positions_kept=kept,
        seconds=seconds,
        packed=packed,
    )


def _begin_or_continue(
    settings: CaptureSettings, files: TeacherFiles, dataset: PreparedDataset, shard_positions: int
) -> Manifest:
    """The manifest to go on with: that of the output folder if it is the same capture, or a new one."""
    identity = Identity(
        teacher_sha256=files.sha256(),
        tokenizer_sha256=dataset.tokenizer.sha256,
        dataset_sha256=dataset.content_sha256,
        vocabulary_size=dataset.tokenizer.vocabulary_size,
        temperature=settings.temperature,
        draws=settings.draws,
        seed=settings.seed,
        rows_per_shard=max(1, shard_positions // dataset.row_length),
    )
    if (settings.output / MANIFEST_NAME).is_file():
        existing = read_manifest("--output", settings.output)
        for name, option in _OPTIONS.items():
            ours, theirs = getattr(identity, name), getattr(existing, name)
            if ours != theirs:
                given = {"--teacher": settings.teacher, "--data": settings.data}.get(option, ours)
                allowed = f"the signals in {settings.output} have {name} {theirs}, not {ours}; give another --output"
                raise UserError(option, given, allowed)
        return existing
    return Manifest(
        **identity.model_dump(),
        teacher=settings.teacher,
        teacher_revision=files.revision,
        shards=(),
        complete=False,
        statistics=statistics_of(()),
    )


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two captures don't overwrite each other's manifest; the lock dies with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("--output", folder, "another capture is writing there; wait for it") from None
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        yield
    finally:
        os.close(descriptor)


def _verified(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest without the shards that are missing or damaged; they are captured again."""
    good = []
    for entry in manifest.shards:
        path = folder / entry.file
        if path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256:
            good.append(entry)
        else:
            print(f"capture: {path} is missing or damaged; asking the teacher again", file=sys.stderr)
    return _with_shards(manifest, good, complete=manifest.complete and len(good) == len(manifest.shards))


def _with_shards(manifest: Manifest, shards: list[ShardEntry], complete: bool) -> Manifest:
    """The manifest over these shards, in an order that does not depend on when they were captured."""
    ordered = tuple(sorted(shards, key=lambda entry: (entry.split, entry.rows)))
    return manifest.model_copy(update={"shards": ordered, "complete": complete, "statistics": statistics_of(ordered)})


def _jobs(dataset: PreparedDataset, manifest: Manifest) -> list[Job]:
    """The shards still to capture, in the order in which they are."""
    jobs = []
    for split, rows in (("validation", dataset.validation.num_rows), ("train", dataset.train.num_rows)):
        first_rows = range(0, rows, manifest.rows_per_shard)
        order = np.arange(len(first_rows))
        if split == "train":
            order = np.random.default_rng(manifest.seed).permutation(order)
        for number in order.tolist():
            first = first_rows[number]
            jobs.append(Job(split, number, first, min(first + manifest.rows_per_shard, rows)))
    done = {entry.file for entry in manifest.shards}
    return [job for job in jobs if job.file not in done]


def _coverage(dataset: PreparedDataset, manifest: Manifest) -> dict[str, float]:
    """Fraction of each split's rows that has signals."""
    rows = {"train": dataset.train.num_rows, "validation": dataset.validation.num_rows}
    covered = dict.fromkeys(rows, 0)
    for entry in manifest.shards:
        covered[entry.split] += entry.rows[1] - entry.rows[0]
    return {split: covered[split] / rows[split] if rows[split] else 1.0 for split in rows}


@dataclass(frozen=True)
class _Run:
    """The parts that stay the same while shards are captured."""

    settings: CaptureSettings
    dataset: PreparedDataset
    teacher: Teacher
    folder: Path

    def shards(self, jobs: list[Job], manifest: Manifest) -> Manifest:
        """Capture the jobs one after the other; each is committed before the next begins."""
        from tqdm import tqdm

        if not self.teacher.packed:
            print("capture: this teacher mixes packed documents; asking one at a time", file=sys.stderr)
        total = sum(self._positions(job) for job in jobs)
        with tqdm(total=total, desc="capture", unit="tok", unit_scale=True, disable=None) as bar:
            for done, job in enumerate(jobs, 1):
                signals = self._ask(job, manifest, bar, announce=done == 1)
                rows = (job.first_row, job.last_row)
                entry = write_shard(self.folder, job.file, job.split, rows, signals, manifest, self.teacher.precision)
                manifest = _with_shards(manifest, [*manifest.shards, entry], complete=done == len(jobs))
                write_manifest(self.folder, manifest)
        return manifest

    def _split(self, job: Job) -> Split:
        return self.dataset.train if job.split == "train" else self.dataset.validation

    def _positions(self, job: Job) -> int:
        offsets = self._split(job).row_token_offsets
        return int(offsets[job.last_row] - offsets[job.first_row])

    def _ask(self, job: Job, manifest: Manifest, bar: tqdm, announce: bool) -> PositionSignals:
        """All signals of one shard. Batches never cross its ends, so that a restart repeats the same ones."""
        step = max(1, self.settings.batch_tokens // self.dataset.row_length)
        parts = []
        for first in range(job.first_row, job.last_row, step):
            began = time.perf_counter()
            part = self._ask_rows(job.split, np.arange(first, min(first + step, job.last_row)), manifest)
            if announce and not parts:
                self._announce(part, time.perf_counter() - began, int(bar.total), manifest)
            bar.update(len(part.entropy_N))
            parts.append(part)
        return PositionSignals(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _ask_rows(self, split: str, rows: np.ndarray, manifest: Manifest) -> PositionSignals:
        import torch

        batch = getattr(self.dataset, split).batch(rows)
        real_B = (batch.segments >= 0).sum(1)
        batch = type(batch)(*(array[:, : real_B.max()] for array in batch))
        uniforms_Nn = np.concatenate(
            [
                row_uniforms(manifest.seed, split, row, real, manifest.draws)
                for row, real in zip(rows.tolist(), real_B.tolist(), strict=True)
            ]
        )
        places_N = np.flatnonzero(batch.segments.reshape(-1) >= 0)
        try:
            return position_signals(
                self.teacher.logits(batch),
                places_N,
                batch.labels.reshape(-1)[places_N],
                uniforms_Nn,
                manifest.vocabulary_size,
                manifest.temperature,
            )
        except FloatingPointError:
            allowed = f"must give finite logits (nan or inf in {split} rows {rows[0]} to {rows[-1]})"
            raise UserError("--teacher", self.settings.teacher, allowed) from None
        except torch.OutOfMemoryError:
            raise UserError("--batch-tokens", self.settings.batch_tokens, "must be smaller: out of memory") from None

    def _announce(self, part: PositionSignals, seconds: float, total: int, manifest: Manifest) -> None:
        """Say what lies ahead, from the first batch."""
        positions = len(part.entropy_N)
        hours = seconds / positions * total / 3600
        width = entry_bits(manifest.vocabulary_size, manifest.draws).width
        size = (7 + len(part.ids_M) / positions * width / 8) * total
        print(f"capture: {total:,} positions, about {hours:.3g} hours and {size / 1e6:,.1f} MB", file=sys.stderr)
