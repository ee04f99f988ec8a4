"""Stored teacher signals: the shards' format and the reader that training asks at every step.

A shard is a safetensors file over the positions of some rows: `entropy`, `confidence` and `next_logprob` (float16; nan
where a position has no label), `temperature_entropy` (float16, only where the temperature is not 1),
`ids_per_position` (uint8; uint16 from 256 on; uint32 where all are kept) and `packed`: for each distinct id a number of
ceil(log2 V) + bits(draws) bits, the id above its count. At 50 draws that is 7 bytes a position and 21 bits an id.
Of the kind topk the id stands above a float16 probability, of the kind full there are V float32 probabilities and no
ids. Where a server bounds the entropy, `entropy_low` and `entropy_high` stand in place of `entropy`.

Legend: N positions asked for, C of them covered, K most ids at one of them, M distinct (position, id) pairs.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from indraquantum.errors import UserError
from indraquantum.files import atomic_file, check_manifest_json, sha256_of
from indraquantum.teacher.manifest import MANIFEST_NAME, Identity, Manifest, ShardEntry, Sums, read_manifest
from indraquantum.teacher.packing_bits import pack, packed_bytes, unpack
from indraquantum.teacher.possible import PROBABILITY, Range, check_values, figure_ranges

if TYPE_CHECKING:
    from indraquantum.data.dataset import PreparedDataset
    from indraquantum.data.split import Split
    from indraquantum.loss_v2 import TeacherSignals
    from indraquantum.teacher.sampling import PositionSignals

_DTYPES = {"F16": "<f2", "U8": "u1", "U16": "<u2", "U32": "<u4"}
_GROUP = 16  # positions for which one offset is kept in memory
_LOWEST = -65_504.0  # float16's


class EntryBits(NamedTuple):
    """How many bits an id and its amount, a count or a probability, take."""

    id: int
    amount: int

    @property
    def width(self) -> int:
        """Bits for one entry."""
        return self.id + self.amount


def entry_bits(identity: Identity) -> EntryBits:
    """Bits of an entry of these signals."""
    if identity.kind == "full":
        return EntryBits(0, 32)
    id_bits = (identity.vocabulary_size - 1).bit_length()
    return EntryBits(id_bits, identity.draws.bit_length() if identity.kind == "sampled" else 16)


def _entries(signals: PositionSignals, identity: Identity) -> np.ndarray:
    """The numbers to pack."""
    bits, amounts_M = entry_bits(identity), signals.amounts_M
    if identity.kind == "topk":  # rounded down, so that no row sums to more than 1
        halves_M = amounts_M.astype("<f2")
        halves_M = np.where(halves_M > amounts_M, np.nextafter(halves_M, np.float16(0)), halves_M)
        amounts_M = halves_M.view("<u2").astype(np.int64)
    elif identity.kind == "full":
        return amounts_M.astype("<f4").view("<u4").astype(np.int64)
    return signals.ids_M << bits.amount | amounts_M


def _probabilities(amounts_M: np.ndarray, identity: Identity) -> np.ndarray:
    """Counts, or the bits of a probability, as float32 probabilities."""
    if identity.kind == "sampled":
        return amounts_M / np.float32(identity.draws)
    unsigned, floating = ("<u2", "<f2") if identity.kind == "topk" else ("<u4", "<f4")
    return amounts_M.astype(unsigned).view(floating).astype(np.float32)


def write_shard(
    folder: Path,
    file: str,
    split: str,
    rows: tuple[int, int],
    signals: PositionSignals,
    manifest: Manifest,
    precision: str,
) -> ShardEntry:
    """Write one shard atomically and return its entry for the manifest.

    Args:
        folder: of the signals.
        file: the shard's name.
        split: "train" or "validation".
        rows: first row and the one past the last.
        signals: of all real positions of these rows, in their order.
        manifest: gives the vocabulary's size, the draws and the temperature.
        precision: number format that the teacher computed in.
    """
    from safetensors.numpy import save_file

    labelled_N = ~np.isnan(signals.next_logprob_N)
    tensors = {
        "confidence": signals.confidence_N.astype("<f2"),
        "next_logprob": np.maximum(signals.next_logprob_N, _LOWEST).astype("<f2"),
        "ids_per_position": signals.ids_per_position_N.astype(_count_dtype(manifest)),
        "packed": pack(_entries(signals, manifest), entry_bits(manifest).width),
    }
    entropy_sum = float(signals.entropy_N.sum(dtype=np.float64))
    bounds = None
    if signals.entropy_high_N is None:
        tensors["entropy"] = signals.entropy_N.astype("<f2")
    else:
        tensors["entropy_low"] = signals.entropy_N.astype("<f2")
        tensors["entropy_high"] = signals.entropy_high_N.astype("<f2")
        bounds = (entropy_sum, float(signals.entropy_high_N.sum(dtype=np.float64)))
    if manifest.temperature != 1.0:
        tensors["temperature_entropy"] = signals.temperature_entropy_N.astype("<f2")
    with atomic_file(folder / file) as temporary:
        save_file(tensors, temporary)
        sha256, size = sha256_of(temporary), temporary.stat().st_size
    return ShardEntry(
        file=file,
        split=split,
        rows=rows,
        positions=len(signals.entropy_N),
        sha256=sha256,
        bytes=size,
        precision=precision,
        sums=Sums(
            ids=len(signals.ids_M),
            entropy_nats=entropy_sum if bounds is None else None,
            entropy_bounds_nats=bounds,
            confidence=float(signals.confidence_N.sum(dtype=np.float64)),
            labels=int(labelled_N.sum()),
            label_logprob_nats=float(np.maximum(signals.next_logprob_N[labelled_N], _LOWEST).sum(dtype=np.float64)),
        ),
    )


def _count_dtype(identity: Identity) -> str:
    if identity.kind == "full":
        return "<u4"
    return "u1" if (identity.draws or identity.top_k) <= 255 else "<u2"


class Shard:
    """One memory-mapped shard."""

    def __init__(self, field: str, path: Path, entry: ShardEntry, manifest: Manifest) -> None:
        """Map the file at `path`.

        Raises:
            UserError: the file's inside is not what its entry and the manifest say.
        """
        self._field, self._path, self._manifest, self._ranges = field, path, manifest, figure_ranges(manifest)
        names = ["confidence", "next_logprob", *(("entropy_low", "entropy_high") if manifest.served else ("entropy",))]
        if manifest.temperature != 1.0:
            names.append("temperature_entropy")
        try:
            tensors = _map_safetensors(path)
            self.figures = {name: tensors[name] for name in names}
            self.ids_per_position, self.packed = tensors["ids_per_position"], tensors["packed"]
            kinds = {tensors[name].dtype.str for name in names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(field, path, f"is damaged ({type(error).__name__}: {error})") from None
        groups = np.pad(self.ids_per_position, (0, -entry.positions % _GROUP)).reshape(-1, _GROUP)
        ids_in_group = groups.sum(1, dtype=np.int64)
        self._group_begin = np.cumsum(ids_in_group) - ids_in_group
        if (
            any(array.shape != (entry.positions,) for array in (*self.figures.values(), self.ids_per_position))
            or kinds != {"<f2"}
            or self.ids_per_position.dtype != _count_dtype(manifest)
            or self.packed.shape != (packed_bytes(int(ids_in_group.sum()), entry_bits(manifest).width),)
        ):
            raise UserError(field, path, "is damaged (its tensors don't fit together)")

    def figure(self, name: str, places_C: np.ndarray | slice) -> np.ndarray:
        """Values of one of the scalar tensors, after `check`."""
        values_C = self.figures[name][places_C]
        self.check(name, values_C, self._ranges[name])
        return values_C

    def check(self, name: str, values_C: np.ndarray, allowed: Range) -> None:
        """Refuse values out of a range; file, tensor, value and range are named."""
        if (place := allowed.first_outside(values_C)) is not None:
            self.refuse(f"{name} is {values_C[place]:.6g}, which must be from {allowed.low:.6g} to {allowed.high:.6g}")

    def refuse(self, why: str) -> NoReturn:
        """Raise the UserError of signals that no teacher can have given."""
        raise UserError(self._field, self._path, f"holds impossible signals: {why}")

    def entries(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and amounts of neighbouring entries of the stream; ids mean nothing where all tokens are kept."""
        bits = entry_bits(self._manifest)
        numbers_M = unpack(self.packed, first + np.arange(count), bits.width)
        amounts_M = numbers_M & ((1 << bits.amount) - 1)
        if self._manifest.kind != "sampled":
            amounts_M = _probabilities(amounts_M, self._manifest)
        return numbers_M >> bits.amount, amounts_M

    def first_entry(self, places_C: np.ndarray) -> np.ndarray:
        """The number of the first entry of each position, in the shard's stream of entries."""
        # Keeping an offset for each position would take as much memory as the entries themselves on disk.
        group_C = places_C // _GROUP
        in_group = np.arange(_GROUP)
        near_CG = np.minimum(group_C[:, None] * _GROUP + in_group, len(self.ids_per_position) - 1)
        earlier_CG = in_group < (places_C % _GROUP)[:, None]
        return self._group_begin[group_C] + (self.ids_per_position[near_CG] * earlier_CG).sum(1, dtype=np.int64)


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file without copying; safetensors' own numpy reader copies whole tensors."""
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:begin].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        first, last = about["data_offsets"]
        flat = raw[begin + first : begin + last].view(_DTYPES[about["dtype"]])
        tensors[name] = flat.reshape(about["shape"])
    return tensors


class _SplitShards(NamedTuple):
    """Where a split's shards lie among its positions, in ascending order."""

    entries: list[ShardEntry]
    begins: np.ndarray  # (shards,) int64: first position
    ends: np.ndarray  # (shards,) int64: one past the last


class SignalStore:
    """The signals of one dataset: give it positions, it gives the teacher's distributions.

    Attributes:
        manifest: the checked manifest; `manifest.statistics` says what the signals are like.
        coverage_by_split: fraction of each split's rows that has signals.
        coverage: that of the training rows.
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
        """Check that the shards' rows lie in the split, apart from each other, and hold what they say."""
        offsets, free = split.row_token_offsets, 0
        for entry in entries:
            first, last = entry.rows
            fits = free <= first < last <= split.num_rows
            if not fits or offsets[last] - offsets[first] != entry.positions:
                raise UserError(self._field, entry.file, f"has rows {list(entry.rows)}, which the dataset lacks")
            free = last
        rows = np.array([entry.rows for entry in entries], np.int64).reshape(-1, 2)
        return _SplitShards(entries, np.asarray(offsets)[rows[:, 0]], np.asarray(offsets)[rows[:, 1]])

    def __getstate__(self) -> dict[str, object]:
        """Leave the maps behind: a worker process opens its own."""
        return self.__dict__ | {"_opened": {}}

    def _open(self, entry: ShardEntry) -> Shard:
        if entry.file not in self._opened:
            self._opened[entry.file] = Shard(self._field, self._folder / entry.file, entry, self.manifest)
        return self._opened[entry.file]

    def batch(self, split: str, index_N: np.ndarray) -> TeacherSignals:
        """The teacher's signals at any positions, in any order.

        Args:
            split: "train" or "validation".
            index_N: (N,) int64 positions (`Batch.index`); -1 for none.

        Returns:
            TeacherSignals of CPU tensors: ids_NK int64 padded with -1, probs_NK float32 (count / draws, or
            probabilities; 0 at the padding), entropy_N (None where a server only bounds it) and confidence_N float32,
            temperature_entropy_N where the temperature is not 1.
            A position without signals has no ids and zeros.

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
        """The entries of the given positions of one shard, position after position."""
        ends_C = np.cumsum(counts_C)
        which_M = np.repeat(shard.first_entry(places_C) - (ends_C - counts_C), counts_C)
        which_M += np.arange(len(which_M))
        return unpack(shard.packed, which_M, entry_bits(self.manifest).width)

    def _pad(
        self, positions: int, covered_C: np.ndarray, counts_C: np.ndarray, numbers_M: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Entries into ids_NK and probs_NK."""
        bits = entry_bits(self.manifest)
        most = int(counts_C.max(initial=1))
        place_M = np.arange(len(numbers_M)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
        ids_M = place_M.copy() if self.manifest.kind == "full" else numbers_M >> bits.amount
        place_M += np.repeat(covered_C * most, counts_C)
        if ids_M.max(initial=0) >= self.manifest.vocabulary_size:
            raise UserError(self._field, self._folder, "is damaged (an id lies past the vocabulary)")
        ids_NK = np.full((positions, most), -1, np.int64)
        probs_NK = np.zeros((positions, most), np.float32)
        ids_NK.reshape(-1)[place_M] = ids_M
        probs_M = _probabilities(numbers_M & ((1 << bits.amount) - 1), self.manifest)
        if PROBABILITY.first_outside(probs_M) is not None:
            raise UserError(self._field, self._folder, "is damaged (a probability is not from 0 to 1)")
        probs_NK.reshape(-1)[place_M] = probs_M
        return ids_NK, probs_NK


def open_signals(field: str, folder: Path | str, dataset: PreparedDataset) -> SignalStore:
    """Open signals for training; checks that they belong to `dataset` and that no shard is missing or cut off.

    Args:
        field: the option to name in an error, as typed.
        folder: what `capture` wrote.
        dataset: the prepared dataset that they must belong to.

    Raises:
        UserError: not signals, of another dataset or tokenizer (both values are named), or a file is missing.
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
            raise UserError(field, path, f"must have {entry.bytes} bytes, but {found}: capture it again")
    return SignalStore(field, folder, manifest, dataset)


def verify_signals(field: str, folder: Path | str, dataset: PreparedDataset) -> SignalStore:
    """`open_signals`, and in addition every byte against the manifest's SHA-256, and every value.

    Raises:
        UserError: as `open_signals`, a shard's bytes have changed, or it holds what no teacher can have said.
    """
    from indraquantum.progress import Progress

    check_manifest_json(field, Path(folder) / MANIFEST_NAME)
    store = open_signals(field, folder, dataset)
    with Progress("verify signals", len(store.manifest.shards), "shards") as progress:
        for entry in store.manifest.shards:
            path = Path(folder) / entry.file
            if (actual := sha256_of(path)) != entry.sha256:
                raise UserError(field, path, f"must have sha256 {entry.sha256}, not {actual}: capture it again")
            check_values(Shard(field, path, entry, store.manifest), entry, store.manifest)
            progress.update()
    return store
