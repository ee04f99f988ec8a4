"""Decides by a hash of each document which ones are held out, so that their order has no influence.

Two parts are held out: validation, for choices during training, and test, for a final report alone. Documents that
share a paragraph go to the same part, so that the model is never trained on held-out text. A paragraph that very many
documents have, such as a line of a licence, tells nothing about them; `without_common` leaves it out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from indraquantum.data.large_arrays import first_places, key_parts

SPLITS = ("train", "validation", "test")  # the number of a part is its place here
TRAIN, VALIDATION, TEST = range(len(SPLITS))
FRACTION_PERCENT = 1  # of each held-out part
AT_LEAST = 4
COMMON = 20  # a paragraph of more documents, and of more than FRACTION_PERCENT of them, keeps none together


class Keys(NamedTuple):
    """The hashes of the documents of one source, cut to 8 bytes, so that millions take little memory."""

    documents: np.ndarray  # (documents,) uint64
    paragraphs: np.ndarray  # (paragraphs,) uint64: what documents of different parts must not share
    owners: np.ndarray  # (paragraphs,) int64: the document of each, by its place


class Common(NamedTuple):
    """A paragraph that very many documents of a source have."""

    key: int
    owner: int  # the first document that has it, by its place
    documents: int  # how many different ones have it


class WithoutCommon(NamedTuple):
    """The keys of a source without the paragraphs that very many documents have."""

    keys: Keys
    common: list[Common]  # what was left out


def text_key(text: bytes) -> int:
    """Return the key of a document or a paragraph. A document of one paragraph has the paragraph's key."""
    return int.from_bytes(hashlib.sha256(b"held out\0" + text).digest()[:8], "big")


def different_documents(source: Keys) -> int:
    """Return how many documents of a source differ."""
    return sum(len(part.first) for part in key_parts(source.documents))


def without_common(source: Keys) -> WithoutCommon:
    """Leave out the paragraphs of more than COMMON different documents and more than 1 % of them.

    All documents with such a paragraph together are too many for a held-out part. They would all stay for training, and
    if every document has it, nothing could be held out.
    """
    most = max(COMMON, different_documents(source) * FRACTION_PERCENT // 100)
    kept, common = np.ones(len(source.paragraphs), dtype=bool), []
    for part in key_parts(source.paragraphs):
        counts = np.bincount(part.group)
        often = np.flatnonzero(counts > most)  # in that many documents, or many times in a few
        if not len(often):
            continue
        ends, by_group = np.cumsum(counts), part.places[np.argsort(part.group, kind="stable")]
        for group in often:
            entries = by_group[ends[group] - counts[group] : ends[group]]
            documents = len(np.unique(source.documents[source.owners[entries]]))
            if documents > most:
                kept[entries] = False
                first = entries[0]
                common.append(Common(int(source.paragraphs[first]), int(source.owners[first]), documents))
    keys = Keys(source.documents, source.paragraphs[kept], source.owners[kept]) if common else source
    return WithoutCommon(keys, common)


def choose_held_out(sources: Iterable[Iterable[bytes]]) -> list[np.ndarray]:
    """Choose the part of each document, given as bytes, whatever paragraphs it shares; see `hold_out`."""
    keys = [np.fromiter(map(text_key, source), dtype=np.uint64) for source in sources]
    return hold_out([Keys(documents, np.empty(0, np.uint64), np.empty(0, np.int64)) for documents in keys])


def hold_out(sources: Sequence[Keys]) -> list[np.ndarray]:
    """Choose which documents of each source are held out for validation and for the test.

    Validation takes 1 % of the different documents of each source, those with the smallest hashes: at least 4, but
    never more than half of them. A source of 1 document has no validation. The test takes as many of the next smallest
    hashes, as long as at least half of the documents are left for training. Equal documents, and documents that share a
    paragraph, go to the same part, whatever their source. A family of such documents is skipped if it is too large for
    a part, or if less than half of any of its sources would be left for training.

    Returns:
        For each source the part of each document, (documents,) uint8: TRAIN, VALIDATION or TEST.
    """
    starts = np.cumsum([0, *(len(source.documents) for source in sources)])
    first = first_places(_joined([source.documents for source in sources]))
    family = _families(sources, starts, first)
    different = first == np.arange(len(first))
    sizes = np.bincount(family[different], minlength=len(first))  # different documents of each family
    parts = np.zeros(len(first), dtype=np.uint8)  # by family
    counts = [different_documents(source) for source in sources]
    room = _Room(sources, starts, family, counts)
    for part in (VALIDATION, TEST):
        chosen: set[int] = set()
        for number, (source, start, count) in enumerate(zip(sources, starts, counts, strict=False)):
            share = max(-(-count * FRACTION_PERCENT // 100), AT_LEAST)
            wanted = min(share, count // 2 - (part - VALIDATION) * share)
            by_key = (family[start + keys.places[keys.first]] for keys in key_parts(source.documents))
            candidates = (place for place in itertools.chain.from_iterable(by_key) if parts[place] == TRAIN)
            chosen |= _take(candidates, sizes, wanted, number, room)
        parts[list(chosen)] = part
    return [parts[family[start:stop]] for start, stop in itertools.pairwise(starts)]


class _Room:
    """Counts how many different documents of each source may still be held out, so that half of them are left."""

    def __init__(self, sources: Sequence[Keys], starts: np.ndarray, family: np.ndarray, counts: Sequence[int]) -> None:
        origin = np.repeat(np.arange(len(sources), dtype=np.uint8), np.diff(starts))
        shared = np.zeros(len(family), dtype=bool)  # the families of several sources; usually there are few
        shared[family[origin[family] != origin]] = True
        found = [
            of_each[shared[of_each]] * len(sources) + number
            for number, (source, start) in enumerate(zip(sources, starts, strict=False))
            for of_each in (family[start + keys.places[keys.first]] for keys in key_parts(source.documents))
        ]
        # Pairs of such a family and a source, each as one number, and the different documents of each pair.
        self._pairs, self._sizes = np.unique(np.concatenate(found), return_counts=True)
        self._left = [count // 2 for count in counts]
        self._out: set[int] = set()

    def take(self, family: int, size: int, source: int) -> bool:
        """Hold out a family, of `size` documents if only `source` has it, and return whether there is room for it."""
        if family in self._out:
            return True
        start, stop = np.searchsorted(self._pairs, (family * len(self._left), (family + 1) * len(self._left)))
        numbers = (self._pairs[start:stop] % len(self._left)).tolist()
        lost = dict(zip(numbers, self._sizes[start:stop].tolist(), strict=True)) or {source: size}
        if any(self._left[number] < count for number, count in lost.items()):
            return False
        for number, count in lost.items():
            self._left[number] -= count
        self._out.add(family)
        return True


def _take(candidates: Iterable[int], sizes: np.ndarray, wanted: int, source: int, room: _Room) -> set[int]:
    """The first families that together have `wanted` different documents, or as many as fit and there is room for."""
    taken: set[int] = set()
    for candidate in candidates:
        if wanted <= 0:
            break
        family, size = int(candidate), int(sizes[candidate])
        if family not in taken and size <= wanted and room.take(family, size, source):
            taken.add(family)
            wanted -= size
    return taken


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts end to end; no copy of a single one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _families(sources: Sequence[Keys], starts: np.ndarray, family: np.ndarray) -> np.ndarray:
    """The family of each document: the place of the first of all those that hang together by shared paragraphs.

    Args:
        sources: The keys.
        starts: The place of each source's first document among all, and one past the last.
        family: The place of the first document that equals each.
    """
    if not any(len(source.paragraphs) for source in sources):
        return family
    units = np.concatenate([part for source in sources for part in (source.documents, source.paragraphs)])
    owners = np.concatenate(
        [
            start + part
            for start, source in zip(starts, sources, strict=False)
            for part in (np.arange(len(source.documents)), source.owners)
        ]
    )
    units = first_places(units)
    while True:  # the smallest place spreads over shared paragraphs until nothing changes
        smallest = np.full(len(units), starts[-1])
        np.minimum.at(smallest, units, family[owners])
        spread = family.copy()
        np.minimum.at(spread, owners, smallest[units])
        spread = spread[spread]  # and along what is known already
        if np.array_equal(spread, family):
            return family
        family = spread
