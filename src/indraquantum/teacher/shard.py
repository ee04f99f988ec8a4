"""One shard of stored teacher signals: its format, how it is written, and how it is mapped into memory.

A shard is a safetensors file over the positions of some rows: `entropy`, `confidence` and `next_logprob` (float16; nan
where a position has no label), `temperature_entropy` (float16, only if the temperature is not 1), `ids_per_position`
(uint8; uint16 from 256 on; uint32 if all tokens are stored) and `packed`. That has a number for each distinct id, of
ceil(log2 V) + bits(draws) bits: the id in the upper bits and its count in the lower bits. At 50 draws this takes 7
bytes a position and 21 bits an id. For the kind topk the lower bits hold a float16 probability. For the kind full there
are V float32 probabilities and no ids. If a server bounds the entropy, `entropy_low` and `entropy_high` replace
`entropy`.

Legend: N positions, C of them asked for, M distinct (position, id) pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from indraquantum.errors import UserError
from indraquantum.files import atomic_file, sha256_of
from indraquantum.teacher.manifest import Identity, Manifest, ShardEntry, Sums
from indraquantum.teacher.packing_bits import pack_bits, packed_bytes, unpack_bits
from indraquantum.teacher.ranges import Range, figure_ranges

if TYPE_CHECKING:
    from indraquantum.teacher.sampling import PositionSignals

_DTYPES = {"F16": "<f2", "U8": "u1", "U16": "<u2", "U32": "<u4"}
_GROUP = 16  # positions that share one offset in memory
_LOWEST = -65_504.0  # float16's


class EntryBits(NamedTuple):
    """The bits of an id and of its amount, which is a count or a probability."""

    id: int
    amount: int

    @property
    def width(self) -> int:
        """Bits of one entry."""
        return self.id + self.amount


def entry_bits(identity: Identity) -> EntryBits:
    """Return the bits of an entry of these signals."""
    if identity.kind == "full":
        return EntryBits(0, 32)
    id_bits = (identity.vocabulary_size - 1).bit_length()
    return EntryBits(id_bits, identity.draws.bit_length() if identity.kind == "sampled" else 16)


def _entries(signals: PositionSignals, identity: Identity) -> np.ndarray:
    """Return the numbers to be packed."""
    bits, amounts_M = entry_bits(identity), signals.amounts_M
    if identity.kind == "topk":  # rounded down, so that no row sums to more than 1
        halves_M = amounts_M.astype("<f2")
        halves_M = np.where(halves_M > amounts_M, np.nextafter(halves_M, np.float16(0)), halves_M)
        amounts_M = halves_M.view("<u2").astype(np.int64)
    elif identity.kind == "full":
        return amounts_M.astype("<f4").view("<u4").astype(np.int64)
    return signals.ids_M << bits.amount | amounts_M


def probabilities(amounts_M: np.ndarray, identity: Identity) -> np.ndarray:
    """Return counts, or the bits of probabilities, as float32 probabilities."""
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
        folder: the folder of the signals.
        file: the name of the shard.
        split: "train" or "validation".
        rows: the first row and the one past the last.
        signals: the signals of all real positions of these rows, in their order.
        manifest: the manifest, for the vocabulary's size, the draws and the temperature.
        precision: the number format in which the teacher computed.
    """
    from safetensors.numpy import save

    labelled_N = ~np.isnan(signals.next_logprob_N)
    tensors = {
        "confidence": signals.confidence_N.astype("<f2"),
        "next_logprob": np.maximum(signals.next_logprob_N, _LOWEST).astype("<f2"),
        "ids_per_position": signals.ids_per_position_N.astype(_count_dtype(manifest)),
        "packed": pack_bits(_entries(signals, manifest), entry_bits(manifest).width),
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
        temporary.write_bytes(save(tensors))  # safetensors' own writing hides the system's error, such as a full disk
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
            UserError: the content of the file does not fit its entry and the manifest.
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
            raise UserError(field, path, "is damaged: its tensors don't fit together")

    def figure(self, name: str, places_C: np.ndarray | slice) -> np.ndarray:
        """Return values of one of the scalar tensors, after `check`."""
        values_C = self.figures[name][places_C]
        self.check(name, values_C, self._ranges[name])
        return values_C

    def check(self, name: str, values_C: np.ndarray, allowed: Range) -> None:
        """Refuse values out of range; the message names file, tensor, value and range."""
        if (place := allowed.first_outside(values_C)) is not None:
            self.refuse(f"{name} is {values_C[place]:.6g}, but must be from {allowed.low:.6g} to {allowed.high:.6g}")

    def refuse(self, why: str) -> NoReturn:
        """Raise the UserError for signals that no teacher can have given."""
        raise UserError(self._field, self._path, f"holds impossible signals: {why}")

    def entries(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and amounts of neighbouring entries of the stream. For the kind full the ids have no meaning."""
        bits = entry_bits(self._manifest)
        numbers_M = unpack_bits(self.packed, first + np.arange(count), bits.width)
        amounts_M = numbers_M & ((1 << bits.amount) - 1)
        if self._manifest.kind != "sampled":
            amounts_M = probabilities(amounts_M, self._manifest)
        return numbers_M >> bits.amount, amounts_M

    def first_entry(self, places_C: np.ndarray) -> np.ndarray:
        """Return the number of the first entry of each position in the shard's stream of entries."""
        # An offset for each position would take as much memory as the entries take on the disk.
        group_C = places_C // _GROUP
        in_group = np.arange(_GROUP)
        near_CG = np.minimum(group_C[:, None] * _GROUP + in_group, len(self.ids_per_position) - 1)
        earlier_CG = in_group < (places_C % _GROUP)[:, None]
        return self._group_begin[group_C] + (self.ids_per_position[near_CG] * earlier_CG).sum(1, dtype=np.int64)


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map the tensors of a safetensors file without copying; the library's own numpy reader copies whole tensors."""
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
