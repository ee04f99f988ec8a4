"""Arrays that are too large for memory: mapped files, which are read in chunks and released on the way."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHUNK_ENTRIES = 1 << 20
KEY_BITS = 4  # keys are sorted in 2 to the power of this many parts


def release(values: np.ndarray) -> None:
    """Release the memory of a mapped file's pages; the system reads them again when they are needed."""
    mapped = getattr(values, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array's entries in order, as contiguous parts of at most CHUNK_ENTRIES."""
    for start in range(0, len(values), CHUNK_ENTRIES):
        yield np.ascontiguousarray(values[start : start + CHUNK_ENTRIES])
        release(values)


class KeyPart(NamedTuple):
    """The keys of one range of values, n of them, m different ones."""

    places: np.ndarray  # (n,) int64: their places, ascending
    first: (
        np.ndarray
    )  # (m,) int64: the first of each different key, as an index into `places`, in the order of the keys
    group: np.ndarray  # (n,) int64: the number of each one's different key


def key_parts(keys: np.ndarray) -> Iterator[KeyPart]:
    """Find equal keys, (keys,) uint64, range by range in ascending order.

    The keys must be spread evenly, as hashes are. Sorting then takes memory for a sixteenth of them at a time.
    """
    part_of = (keys >> np.uint64(64 - KEY_BITS)).astype(np.uint8)
    for number in range(1 << KEY_BITS):
        places = np.flatnonzero(part_of == number)
        _, first, group = np.unique(keys[places], return_index=True, return_inverse=True)
        yield KeyPart(places, first, group)


def first_places(keys: np.ndarray) -> np.ndarray:
    """Return for each key the place of the first one that equals it, (keys,) int64."""
    places = np.empty(len(keys), np.int64)
    for part in key_parts(keys):
        places[part.places] = part.places[part.first[part.group]]
    return places


def save_npy(path: Path, values: np.ndarray) -> None:
    """Write the same bytes as `np.save`, chunk by chunk, so that a mapped array need not fit into memory."""
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False, "shape": values.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks(values):
            file.write(chunk.data)


class Spool:
    """An array that grows row by row in a file, and is mapped once it is complete."""

    def __init__(self, path: Path, dtype: Any, columns: int = 0) -> None:
        """Begin an empty file.

        Args:
            path: The file; its folder is a temporary one.
            dtype: Type of the entries.
            columns: Entries of a row; 0 for an array of one dimension.
        """
        self.path, self.dtype, self.columns = path, np.dtype(dtype), columns
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `array`)

    def add(self, values: np.ndarray) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)

    def array(self) -> np.ndarray:
        """Close the file and return what was added, mapped for reading."""
        self._file.close()
        shape = (-1, self.columns) if self.columns else (-1,)
        if not self.path.stat().st_size:
            return np.empty((0, self.columns) if self.columns else 0, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r").reshape(shape)
