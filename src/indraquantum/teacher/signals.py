"""Reads stored teacher signals for training, at any positions in any order. shard.py describes the format.

Legend: N positions asked for, C of them covered, K most ids at one of them, M distinct (position, id) pairs.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indraquantum.errors import UserError
from indraquantum.files import check_manifest_json, sha256_of
from indraquantum.teacher.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from indraquantum.teacher.packing_bits import unpack_bits
from indraquantum.teacher.ranges import PROBABILITY
from indraquantum.teacher.shard import Shard, entry_bits, probabilities
from indraquantum.teacher.signal_checks import check_values

if TYPE_CHECKING:
    from indraquantum.data.dataset import PreparedDataset
    from indraquantum.data.split import Split
    from indraquantum.loss_v2 import TeacherSignals


class _SplitShards(NamedTuple):
    """The positions of a split's shards, in ascending order."""

    entries: list[ShardEntry]
    begins: np.ndarray  # (shards,) int64: first position
    ends: np.ndarray  # (shards,) int64: one past the last


class SignalStore:
    """The signals of one dataset: it gives the teacher's distributions at any positions.

    Attributes:
        manifest: the checked manifest; `manifest.statistics` describes the signals.
        coverage_by_split: the fraction of each split's rows that has signals.
        coverage: the fraction of the training rows that has signals.
    """

    def __init__(self, field: str, folder: Path, manifest: Manifest, dataset: PreparedDataset) -> None:
        """Use `open_signals`, which checks."""
        self._field, self._folder, self.manifest = field, folder, manifest
        self._opened: dict[str, Shard] = {}
        self._splits: dict[str, _SplitShards] = {}
        self.coverage_by_split: dict[str, float] = {}
        for name, split in (("train", dataset.train), ("validation", dataset.validation)):
            entries = sorted((e for e in manifest.shards if e.split == name), key=lambda entry: entry.rows)
            self._splits[name] = self._place(split, entries)
            covered = sum(entry.rows[1] - entry.rows[0] for entry in entries)
            self.coverage_by_split[name] = covered / split.num_rows if split.num_rows else 1.0
        self.coverage = self.coverage_by_split["train"]

    def _place(self, split: Split, entries: list[ShardEntry]) -> _SplitShards:
        """Check that the shards' rows are in the split, do not overlap, and have the stated positions."""
        offsets, free = split.row_token_offsets, 0
        for entry in entries:
            first, last = entry.rows
            fits = free <= first < last <= split.num_rows
            if not fits or offsets[last] - offsets[first] != entry.positions:
                raise UserError(
                    self._field, entry.file, f"has rows {list(entry.rows)}, which the dataset does not have"
                )
            free = last
        rows = np.array([entry.rows for entry in entries], np.int64).reshape(-1, 2)
        return _SplitShards(entries, np.asarray(offsets)[rows[:, 0]], np.asarray(offsets)[rows[:, 1]])

    def __getstate__(self) -> dict[str, object]:
        """Leave out the open files: a worker process opens its own."""
        return self.__dict__ | {"_opened": {}}

    def _open(self, entry: ShardEntry) -> Shard:
        if entry.file not in self._opened:
            self._opened[entry.file] = Shard(self._field, self._folder / entry.file, entry, self.manifest)
        return self._opened[entry.file]

    def batch(self, split: str, index_N: np.ndarray) -> TeacherSignals:
        """Return the teacher's signals at any positions, in any order.

        Args:
            split: "train" or "validation".
            index_N: (N,) int64 positions (`Batch.index`); -1 for none.

        Returns:
            TeacherSignals of CPU tensors: ids_NK int64, padded with -1; probs_NK float32 (count / draws, or
            probabilities; 0 at the padding); entropy_N (None if a server only bounds it) and confidence_N, float32;
            temperature_entropy_N if the temperature is not 1. A position without signals has no ids, and zeros.

        Raises:
            UserError: a shard is damaged.
        """
        import torch

        from indraquantum.loss_v2 import TeacherSignals

        shards = self._splits[split]
        shard_N = np.searchsorted(shards.begins, index_N, "right") - 1
        covered_C = np.flatnonzero(shard_N >= 0)
        covered_C = covered_C[index_N[covered_C] < shards.ends[shard_N[covered_C]]]
        covered_C = covered_C[np.argsort(shard_N[covered_C], kind="stable")]
        edges = np.flatnonzero(np.diff(shard_N[covered_C], prepend=-1, append=-1))  # where the shard changes

        counts_C = np.zeros(len(covered_C), np.int64)
        tempered = self.manifest.temperature != 1.0
        scalars_3N = np.zeros((3 if tempered else 2, len(index_N)), np.float32)
        numbers = [np.zeros(0, np.int64)]
        for begin, end in pairwise(edges.tolist()):
            here = covered_C[begin:end]
            number = shard_N[here[0]]
            shard = self._open(shards.entries[number])
            places = index_N[here] - shards.begins[number]
            counts = shard.ids_per_position[places].astype(np.int64)
            counts_C[begin:end] = counts
            numbers.append(self._numbers(shard, places, counts))
            if not self.manifest.served:
                scalars_3N[0, here] = shard.figure("entropy", places)
            scalars_3N[1, here] = shard.figure("confidence", places)
            if tempered:
                scalars_3N[2, here] = shard.figure("temperature_entropy", places)

        ids_NK, probs_NK = self._pad(len(index_N), covered_C, counts_C, np.concatenate(numbers))
        entropy_N, *others = torch.from_numpy(scalars_3N)
        if self.manifest.served:
            entropy_N = None
        return TeacherSignals(torch.from_numpy(ids_NK), torch.from_numpy(probs_NK), entropy_N, *others)

    def _numbers(self, shard: Shard, places_C: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
        """Return the entries of the given positions of one shard, position after position."""
        ends_C = np.cumsum(counts_C)
        which_M = np.repeat(shard.first_entry(places_C) - (ends_C - counts_C), counts_C)
        which_M += np.arange(len(which_M))
        return unpack_bits(shard.packed, which_M, entry_bits(self.manifest).width)

    def _pad(
        self, positions: int, covered_C: np.ndarray, counts_C: np.ndarray, numbers_M: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries as ids_NK and probs_NK."""
        bits = entry_bits(self.manifest)
        most = int(counts_C.max(initial=1))
        place_M = np.arange(len(numbers_M)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
        ids_M = place_M.copy() if self.manifest.kind == "full" else numbers_M >> bits.amount
        place_M += np.repeat(covered_C * most, counts_C)
        if ids_M.max(initial=0) >= self.manifest.vocabulary_size:
            raise UserError(self._field, self._folder, "is damaged: a token id is outside the vocabulary")
        ids_NK = np.full((positions, most), -1, np.int64)
        probs_NK = np.zeros((positions, most), np.float32)
        ids_NK.reshape(-1)[place_M] = ids_M
        probs_M = probabilities(numbers_M & ((1 << bits.amount) - 1), self.manifest)
        if PROBABILITY.first_outside(probs_M) is not None:
            raise UserError(self._field, self._folder, "is damaged: a probability is not from 0 to 1")
        probs_NK.reshape(-1)[place_M] = probs_M
        return ids_NK, probs_NK


def open_signals(field: str, folder: Path | str, dataset: PreparedDataset) -> SignalStore:
    """Open signals for training. Check that they belong to `dataset` and that no shard is missing or cut off.

    Args:
        field: the option to name in an error, as typed.
        folder: the folder that `capture` wrote.
        dataset: the prepared dataset that they must belong to.

    Raises:
        UserError: these are not signals, they belong to another dataset or tokenizer, or a file is missing.
    """
    folder = Path(folder)
    manifest = read_manifest(field, folder)
    for name, expected in (
        ("tokenizer_sha256", dataset.tokenizer.sha256),
        ("dataset_sha256", dataset.content_sha256),
        ("vocabulary_size", dataset.tokenizer.vocabulary_size),
    ):
        if (actual := getattr(manifest, name)) != expected:
            raise UserError(field, folder, f"must belong to the dataset: its {name} is {actual}, not {expected}")
    for entry in manifest.shards:
        path = folder / entry.file
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(field, path, f"must have {entry.bytes} bytes, but {found}; run the capture again")
    return SignalStore(field, folder, manifest, dataset)


def verify_signals(field: str, folder: Path | str, dataset: PreparedDataset) -> SignalStore:
    """Open signals as `open_signals` does, and check every byte against the manifest's SHA-256, and every value.

    Raises:
        UserError: as `open_signals`; or a shard's bytes have changed; or it holds impossible values.
    """
    from indraquantum.progress import Progress

    check_manifest_json(field, Path(folder) / MANIFEST_NAME)
    store = open_signals(field, folder, dataset)
    with Progress("verify signals", len(store.manifest.shards), "shards") as progress:
        for entry in store.manifest.shards:
            path = Path(folder) / entry.file
            if (actual := sha256_of(path)) != entry.sha256:
                raise UserError(field, path, f"must have sha256 {entry.sha256}, not {actual}; run the capture again")
            check_values(Shard(field, path, entry, store.manifest), entry, store.manifest)
            progress.update()
    return store
