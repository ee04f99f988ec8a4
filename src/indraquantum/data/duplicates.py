"""Finds copies among documents: exact copies by hash, near copies by MinHash and then by their true overlap.

Two documents are near copies if at least 80 % of all runs of 5 words that either of them has are in both (Jaccard).
MinHash (Broder 1997) with bands finds the pairs worth comparing. Each pair is then compared exactly, so that no
estimate decides. The code is our own, because the removed samples must not change with the version of a library.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from indraquantum.data.large_arrays import first_places

SHINGLE_WORDS = 5
NEAR = 0.8
BANDS, BAND_ROWS = 16, 4  # a pair at 0.8 is missed with probability (1 - 0.8^4)^16 = 0.0002
COMPARED = 64  # of the texts that share a band, those that share most: a pair at 0.8 shares 6.5 of 16 on the average
BLOCK_SHINGLES = 1 << 14  # hashed at once, in 8 MB: a book has a hundred times as many
# A word is a run of letters, digits and `_`, and beyond ASCII of all but space and punctuation: \w lacks vowel signs.
PUNCTUATION = "".join(sign for sign in map(chr, range(0x80, 0x20000)) if unicodedata.category(sign)[0] == "P")
WORD = re.compile(rf"(?:\w+|[^\x00-\x7f\s{PUNCTUATION}]+)+")


def exact_duplicates(keys: np.ndarray) -> np.ndarray:
    """Return which keys of texts, (documents,) uint64, equal an earlier one: (documents,) bool."""
    return first_places(keys) != np.arange(len(keys))


def near_duplicates(texts: Sequence[str]) -> np.ndarray:
    """Return which texts nearly equal an earlier one that is not a near copy itself: (documents,) bool.

    Case, punctuation and spacing are ignored in a text that has words. An exact copy counts as a near copy too.
    """
    found = np.zeros(len(texts), dtype=bool)
    kept: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]  # of each band: the texts that are no copies
    seen: set[str] = set()
    for place, text in enumerate(texts):
        shingles = _shingles(text)
        bands = [part.tobytes() for part in _signature(shingles).reshape(BANDS, BAND_ROWS)]
        alike = (of_band.get(band, ()) for band, of_band in zip(bands, kept, strict=True))
        shared = Counter(itertools.chain.from_iterable(alike))
        likely = (earlier for earlier, _ in shared.most_common(COMPARED))
        found[place] = text in seen or any(_overlap(_shingles(texts[e]), shingles) >= NEAR for e in likely)
        seen.add(text)
        if not found[place]:
            for band, of_band in zip(bands, kept, strict=True):
                of_band.setdefault(band, []).append(place)
    return found


def _shingles(text: str) -> np.ndarray:
    """Different hashes of all runs of SHINGLE_WORDS words, uint64; a shorter text is one run, without words itself."""
    found = WORD.findall(text.lower()) or [text]
    words = np.array([zlib.crc32(word.encode()) for word in found], dtype=np.uint64)
    runs = max(len(words) - SHINGLE_WORDS + 1, 1)
    mixed = np.full(runs, len(words) if runs == 1 else 0, dtype=np.uint64)
    for place in range(min(SHINGLE_WORDS, len(words))):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[place : place + runs]
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


_MULTIPLIERS = np.random.PCG64(0).random_raw(BANDS * BAND_ROWS) | np.uint64(1)


def _signature(shingles: np.ndarray) -> np.ndarray:
    """MinHash: the smallest value of the shingles under each of BANDS * BAND_ROWS hash functions."""
    smallest = np.full(len(_MULTIPLIERS), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), BLOCK_SHINGLES):
        mixed = shingles[start : start + BLOCK_SHINGLES, None] * _MULTIPLIERS
        mixed ^= mixed >> np.uint64(32)
        np.minimum(smallest, (mixed * np.uint64(0xD6E8FEB86659FD93)).min(axis=0), out=smallest)
    return smallest


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets of shingles."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
