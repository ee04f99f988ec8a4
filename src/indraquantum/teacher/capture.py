"""Asks a teacher once about all prepared rows and stores its signals: `indra capture`.

Signals are captured shard by shard: first the held-out rows, then the shards of the training rows in random order, so
that a capture that stops early has a fair sample. One or more processes capture the shards (engines.py), and only this
one writes the manifest. A resumed capture checks the finished shards and reads the unfinished ones from their journals,
so that the teacher answers nothing twice.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indraquantum.config import CaptureSettings
from indraquantum.data.gguf_file import GgufFile
from indraquantum.errors import Unreachable, UserError
from indraquantum.files import check_manifest_json, make_folder, sha256_of, try_lock
from indraquantum.progress import Progress, warn
from indraquantum.teacher.batch_size import choose_batch_rows, measured_device, require_memory
from indraquantum.teacher.engines import open_data, run_jobs
from indraquantum.teacher.journal import SUFFIX, journal_path
from indraquantum.teacher.loading import is_quantised
from indraquantum.teacher.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Identity,
    Manifest,
    ShardEntry,
    Statistics,
    TeacherSource,
    read_manifest,
    statistics_of,
    write_manifest,
)
from indraquantum.teacher.precision import Choice, choose_precision, unmeasured_precision
from indraquantum.teacher.served import check_served, is_served, served_identity
from indraquantum.teacher.shard import Shard
from indraquantum.teacher.shard_worker import Job, Plan
from indraquantum.teacher.signal_checks import check_values
from indraquantum.teacher.teacher_files import TeacherFiles, check_tokenizer, find_teacher, is_hub_id

if TYPE_CHECKING:
    from indraquantum.data.prepared import PreparedDataset

SHARD_POSITIONS = 65_536  # about 3 MB; one worker captures one shard at a time
SHARD_ENTRIES = 1 << 25  # tokens with a probability, at 32 bytes in memory each; fewer positions for --kind full
MARK = ".begun-by-train"  # beside the manifest of a capture that training began and has not completed
# The files that a capture writes besides shards and manifest. It leaves all other files in its folder alone.
JOURNAL = re.compile(rf"(train|validation)-\d{{6,}}\.safetensors{re.escape(SUFFIX)}")
LEFTOVER = re.compile(r"\.(manifest\.json|(train|validation)-\d{6,}\.safetensors)\.\d+\.tmp")
_OPTIONS = {
    "kind": "--kind",
    "served": "--teacher",
    "teacher_sha256": "--teacher",
    "tokenizer_sha256": "--data",
    "dataset_sha256": "--data",
    "vocabulary_size": "--data",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "draws": "--draws",
    "seed": "--seed",
}


@dataclass(frozen=True)
class CaptureReport:
    """What a capture has done."""

    output: Path
    teacher: str
    statistics: Statistics  # of all signals in the folder, not only those of this command
    coverage: dict[str, float]  # fraction of each split's rows that has signals
    bytes: int  # of all shards
    positions_asked: int  # by this run
    positions_kept: int  # found finished
    seconds: float  # for loading the teacher, asking it and storing its answers
    packed: bool | None  # False: the teacher mixes the documents of a row and was asked one at a time; None: not asked

    @property
    def tokens_per_second(self) -> float:
        """Real positions captured per second."""
        return self.positions_asked / self.seconds if self.seconds else 0.0


class FolderInUse(UserError):
    """Another process writes to the folder of signals."""


def capture(
    settings: CaptureSettings,
    dataset: PreparedDataset | None = None,
    shard_positions: int = SHARD_POSITIONS,
    *,
    by_train: bool = False,
) -> CaptureReport:
    """Capture a teacher's signals, or resume a capture that was stopped.

    Args:
        settings: the command's options.
        dataset: `settings.data` if it is already open.
        shard_positions: about how many positions a shard has. A resumed capture keeps its own number.
        by_train: whether training captures. It completes a capture that it began, which the file MARK tells it.

    Returns:
        What was done, and statistics of the signals.

    Raises:
        FolderInUse: another process writes to the output folder, which is left as it is.
        UserError: the teacher or the dataset is wrong, or the output folder holds signals of other settings.
    """
    files = None
    if is_served(settings.teacher):
        check_served(settings)
    else:
        try:
            if is_hub_id(settings.teacher) and not (settings.output / MANIFEST_NAME).is_file():
                about = find_teacher("--teacher", settings.teacher, weights=False)
                if not is_quantised(about):  # else the files of the weights tell their size
                    require_memory(settings, about, settings.precision)
            files = find_teacher("--teacher", settings.teacher)
        except Unreachable as error:
            # Of a pickle, the packed dataset beside it.
            folder = settings.data.with_suffix("") if settings.data.suffix == ".pkl" else settings.data
            way = f"`indra teacher --data {folder} --output checkpoints/teacher`, then --teacher checkpoints/teacher"
            raise Unreachable(error.field, error.value, f"{error.allowed}; or train a small one: {way}") from None
    if dataset is None:
        dataset = open_data(settings, files, verify=True)
    if files:
        check_tokenizer(files, dataset)
    identity = _identity(settings, files, dataset, shard_positions)
    folder = make_folder("--output", settings.output)
    with _only_writer(folder):
        manifest = _verified(folder, _begin_or_continue(settings, files, dataset, identity))
        if not manifest.shards:  # who captures the first shard has begun the capture
            _mark(folder, by_train)
        missing = _jobs(dataset, manifest)
        jobs = _wanted(settings, dataset, manifest, missing)
        asked, packed, began = 0, None, time.perf_counter()
        if jobs:
            if files:
                require_memory(settings, files, manifest.known_precision or settings.precision)
                manifest = _with_precision(settings, files, dataset, manifest, jobs)
                settings = settings.model_copy(update={"precision": manifest.precision})
            manifest = _with_batch(settings, files, dataset, manifest)
            try:
                manifest, asked, packed = _capture(settings, files, dataset, manifest, jobs, folder, len(missing))
            except FileNotFoundError:
                if folder.is_dir():
                    raise
                raise UserError("--output", folder, "was removed while the capture wrote to it") from None
        if manifest.complete:
            _mark(folder, False)
        seconds = time.perf_counter() - began
    return CaptureReport(
        output=folder,
        teacher=settings.teacher,
        statistics=manifest.statistics,
        coverage=_coverage(dataset, manifest),
        bytes=sum(shard.bytes for shard in manifest.shards),
        positions_asked=asked,
        positions_kept=manifest.statistics.positions - asked,
        seconds=seconds,
        packed=packed,
    )


def _identity(
    settings: CaptureSettings, files: TeacherFiles | None, dataset: PreparedDataset, shard_positions: int
) -> Identity:
    """Return what the signals of a new capture belong to."""
    entries = {"full": dataset.tokenizer.vocabulary_size, "topk": settings.top_k, "sampled": settings.draws}
    positions = min(shard_positions, SHARD_ENTRIES // entries[settings.kind])
    identity = Identity(
        served=files is None,
        teacher_sha256=files.sha256() if files else served_identity(settings),
        tokenizer_sha256=dataset.tokenizer.sha256,
        dataset_sha256=dataset.content_sha256,
        vocabulary_size=dataset.tokenizer.vocabulary_size,
        temperature=settings.temperature,
        kind=settings.kind,
        draws=settings.draws if settings.kind == "sampled" else None,
        top_k=settings.top_k if settings.kind == "topk" else None,
        seed=settings.seed,
        rows_per_shard=max(1, positions // dataset.row_length),
    )
    if settings.kind == "topk" and settings.top_k > identity.vocabulary_size:
        raise UserError("--top-k", settings.top_k, f"must be at most the vocabulary's {identity.vocabulary_size}")
    return identity


def _begin_or_continue(
    settings: CaptureSettings, files: TeacherFiles | None, dataset: PreparedDataset, identity: Identity
) -> Manifest:
    """Return the manifest of the output folder if it belongs to the same capture, or a new one."""
    if (settings.output / MANIFEST_NAME).is_file():
        check_manifest_json("--output", settings.output / MANIFEST_NAME)
        existing = read_manifest("--output", settings.output)
        for name, option in _OPTIONS.items():
            ours, theirs = getattr(identity, name), getattr(existing, name)
            if ours != theirs:
                given = {"--teacher": settings.teacher, "--data": settings.data}.get(option, ours)
                allowed = f"the signals in {settings.output} have {name} {theirs}, not {ours}; give another --output"
                raise UserError(option, given, allowed)
        known = existing.known_precision
        if files and known and settings.precision not in ("auto", known):
            allowed = f"the signals in {settings.output} are in {known}, which is kept; give another --output"
            raise UserError("--precision", settings.precision, allowed)
        _check_shards(settings.output / MANIFEST_NAME, dataset, existing)
        return existing
    return Manifest(
        **identity.model_dump(),
        teacher=settings.teacher,
        teacher_revision=files.revision if files else None,
        teacher_source=_source(files.gguf) if files and files.gguf else None,
        shards=(),
        complete=False,
        statistics=statistics_of(()),
    )


def _source(file: GgufFile) -> TeacherSource:
    """Return what a GGUF file says of itself."""
    texts = {name: value for name, value in file.metadata.items() if isinstance(value, str)}
    facts = {name.removeprefix("general."): value for name, value in texts.items() if name.startswith("general.")}
    del facts["architecture"]
    return TeacherSource(architecture=file.architecture, quantisation=file.quantisation, facts=facts)


def _check_shards(path: Path, dataset: PreparedDataset, manifest: Manifest) -> None:
    """Refuse a manifest with other shards than a capture of this dataset has."""
    known = {job.file: job for job in _all_jobs(dataset, manifest)}
    for entry in manifest.shards:
        job = known.get(entry.file)
        if job is None or (job.split, job.rows, _positions(dataset, job)) != (entry.split, entry.rows, entry.positions):
            allowed = (
                f"lists {entry.file} with rows {list(entry.rows)} of {entry.split}, which is not a shard of --data"
            )
            raise UserError("--output", path, allowed)


def _with_precision(
    settings: CaptureSettings, files: TeacherFiles, dataset: PreparedDataset, manifest: Manifest, jobs: list[Job]
) -> Manifest:
    """Return the manifest with the teacher's number format: the one of its signals, or one that is chosen now."""
    if not manifest.precision:
        choice = _chosen_precision(settings, files, dataset, manifest, jobs)
        manifest = manifest.model_copy(update=choice._asdict())
    if manifest.precision != "float32" and settings.engine == "local":
        from indraquantum.kernels.onednn import note_slow_16_bits  # here, because it imports torch

        note_slow_16_bits(measured_device(settings), manifest.precision, "capture")
    return manifest


def _chosen_precision(
    settings: CaptureSettings, files: TeacherFiles, dataset: PreparedDataset, manifest: Manifest, jobs: list[Job]
) -> Choice:
    if manifest.batch_rows or manifest.shards:  # begun by an earlier version, which measured nothing
        return Choice(manifest.known_precision or unmeasured_precision(settings), None)
    return choose_precision(settings, files, dataset, sum(_positions(dataset, job) for job in jobs))


def _with_batch(
    settings: CaptureSettings, files: TeacherFiles | None, dataset: PreparedDataset, manifest: Manifest
) -> Manifest:
    """Return the manifest with the rows of a batch: its own number, unless `--batch-tokens` gives another."""
    rows = manifest.batch_rows
    if rows is None or settings.batch_tokens != "auto":
        rows = choose_batch_rows(settings, files, dataset.row_length)
    if manifest.batch_rows not in (None, rows):
        changed = f"from here on in batches of {rows} rows instead of {manifest.batch_rows}; the last bits may differ"
        warn(f"capture: {changed}")
    return manifest.model_copy(update={"batch_rows": rows, "format_version": FORMAT_VERSION})


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two captures don't overwrite each other's manifest. Only its holder removes it."""
    with try_lock(folder) as locked:  # not `folder_lock`, which would leave a file among the signals
        if not locked:
            allowed = "is in use by another run, or its file system has no locks; wait, or give another folder"
            raise FolderInUse("--output", folder, allowed)
        _remove_leftovers(folder)  # of a capture that was killed
        if not (folder / MANIFEST_NAME).is_file():
            for journal in _journals(folder):
                journal.unlink()  # without a manifest it is of no use
        try:
            yield
        finally:
            _remove_leftovers(folder)  # of workers that were killed or stopped
            if (folder / MARK).exists() and not (folder / MANIFEST_NAME).exists():  # training captured nothing
                _mark(folder, False)
                with contextlib.suppress(OSError):  # it holds something else
                    folder.rmdir()


def _mark(folder: Path, by_train: bool) -> None:
    """Write or remove what says that training began the capture in `folder`. Only the holder of the folder does."""
    if by_train:
        (folder / MARK).touch()
    else:
        (folder / MARK).unlink(missing_ok=True)


def _journals(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and JOURNAL.fullmatch(path.name)]


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():  # it may have been removed under the capture
        if path.is_file() and LEFTOVER.fullmatch(path.name):
            path.unlink()


def _verified(folder: Path, manifest: Manifest) -> Manifest:
    """Return the manifest without the shards that are missing or damaged, which are captured again."""
    good = []
    for entry in manifest.shards:
        path = folder / entry.file
        try:
            if not (path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256):
                raise UserError("--output", path, "is missing or damaged")
            check_values(Shard("--output", path, entry, manifest), entry, manifest)
        except UserError as error:
            warn(f"capture: {path} {error.allowed}; it will be captured again")
            continue
        good.append(entry)
        journal_path(folder, entry.file).unlink(
            missing_ok=True
        )  # left by a process that was killed after it wrote the manifest
    return _with_shards(manifest, good, complete=manifest.complete and len(good) == len(manifest.shards))


def _with_shards(manifest: Manifest, shards: list[ShardEntry], complete: bool) -> Manifest:
    """Return the manifest with these shards, in an order that does not depend on when they were captured."""
    ordered = tuple(sorted(shards, key=lambda entry: (entry.split, entry.rows)))
    return manifest.model_copy(update={"shards": ordered, "complete": complete, "statistics": statistics_of(ordered)})


def _jobs(dataset: PreparedDataset, manifest: Manifest) -> list[Job]:
    """Return the shards that are still to be captured, in their order."""
    done = {entry.file for entry in manifest.shards}
    return [job for job in _all_jobs(dataset, manifest) if job.file not in done]


def _wanted(settings: CaptureSettings, dataset: PreparedDataset, manifest: Manifest, jobs: list[Job]) -> list[Job]:
    """Return the first of `jobs`, until the signals have `--max-positions`."""
    if settings.max_positions is None:
        return jobs
    before = itertools.accumulate((_positions(dataset, job) for job in jobs), initial=manifest.statistics.positions)
    return [job for job, positions in zip(jobs, before, strict=False) if positions < settings.max_positions]


def _all_jobs(dataset: PreparedDataset, manifest: Manifest) -> list[Job]:
    """Return every shard of a whole capture, in the order in which they are captured."""
    jobs = []
    for split, rows in (("validation", dataset.validation.num_rows), ("train", dataset.train.num_rows)):
        first_rows = range(0, rows, manifest.rows_per_shard)
        order = np.arange(len(first_rows))
        if split == "train":
            order = np.argsort(np.random.PCG64(manifest.seed).random_raw(len(order)), kind="stable")
        for number in order.tolist():
            first = first_rows[number]
            jobs.append(Job(split, number, first, min(first + manifest.rows_per_shard, rows)))
    return jobs


def _coverage(dataset: PreparedDataset, manifest: Manifest) -> dict[str, float]:
    """Fraction of each split's rows that has signals."""
    rows = {"train": dataset.train.num_rows, "validation": dataset.validation.num_rows}
    covered = dict.fromkeys(rows, 0)
    for entry in manifest.shards:
        covered[entry.split] += entry.rows[1] - entry.rows[0]
    return {split: covered[split] / rows[split] if rows[split] else 1.0 for split in rows}


class _Outcome(NamedTuple):
    """The result of all jobs."""

    manifest: Manifest
    positions_asked: int
    packed: bool | None


def _capture(
    settings: CaptureSettings,
    files: TeacherFiles | None,
    dataset: PreparedDataset,
    manifest: Manifest,
    jobs: list[Job],
    folder: Path,
    missing: int,
) -> _Outcome:
    """Let the engine do the jobs, of `missing` ones, and put each shard into the manifest before the next one."""
    total = sum(_positions(dataset, job) for job in jobs)
    largest = max(_positions(dataset, job) for job in jobs)
    plan = Plan(settings, folder, manifest, total, min(total, largest * settings.workers), jobs[0].file)
    asked, packed = 0, None
    write_manifest(folder, manifest)  # journals belong to it
    try:
        with Progress("capture", total, "tokens") as progress:
            results = run_jobs(
                plan, files, dataset, jobs, lambda positions, before: progress.update(positions, before=before)
            )
            for done, result in enumerate(results, 1):
                manifest = _with_shards(manifest, [*manifest.shards, result.entry], complete=done == missing)
                write_manifest(folder, manifest)
                journal_path(folder, result.entry.file).unlink(missing_ok=True)
                asked += result.positions_asked
                packed = result.packed if packed is None else packed
    except BaseException:  # also Ctrl-C while the teacher loads
        if folder.is_dir() and not manifest.shards and not any(path.stat().st_size for path in _journals(folder)):
            for journal in _journals(folder):  # nothing was captured: nothing is left behind
                journal.unlink(missing_ok=True)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
        raise
    return _Outcome(manifest, asked, packed)


def _positions(dataset: PreparedDataset, job: Job) -> int:
    offsets = (dataset.train if job.split == "train" else dataset.validation).row_token_offsets
    return int(offsets[job.last_row] - offsets[job.first_row])
