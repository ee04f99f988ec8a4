"""Copies among documents: exact ones by hash, near ones by MinHash and then by their true overlap.

Near means that of all runs of 5 words that either document has, at least 80 % are in both (Jaccard). MinHash (Broder
1997) with bands finds the pairs worth comparing; each pair is then compared exactly, so that no estimate decides.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from indraquantum.data.large import first_places

SHINGLE_WORDS = 5
NEAR = 0.8
BANDS, BAND_ROWS = 16, 4  # a pair at 0.8 is missed with probability (1 - 0.8^4)^16 = 0.0002
WORD = re.compile(r"\w+")


def exact_duplicates(keys: np.ndarray) -> np.ndarray:
    """Which keys of texts, (documents,) uint64, equal an earlier one, (documents,) bool."""
    return first_places(keys) != np.arange(len(keys))


def near_duplicates(texts: Sequence[str]) -> np.ndarray:
    """Which texts nearly equal an earlier one that is not itself such a copy, (documents,) bool.

    Case, punctuation and spacing don't count; an exact copy is a near one as well.
    """
    signatures = np.stack([_signature(_shingles(text)) for text in texts]) if texts else np.empty((0, 0), np.uint64)
    found = np.zeros(len(texts), dtype=bool)
    for later, earlier in sorted(_candidates(signatures)):
        if not found[later] and not found[earlier]:
            found[later] = _overlap(_shingles(texts[earlier]), _shingles(texts[later])) >= NEAR
    return found


def _shingles(text: str) -> np.ndarray:
    """Different hashes of all runs of SHINGLE_WORDS words, uint64; a shorter text is one run."""
    words = np.array([zlib.crc32(word.encode()) for word in WORD.findall(text.lower())] or [0], dtype=np.uint64)
    runs = max(len(words) - SHINGLE_WORDS + 1, 1)
    mixed = np.full(runs, len(words) if runs == 1 else 0, dtype=np.uint64)
    for place in range(min(SHINGLE_WORDS, len(words))):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[place : place + runs]
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


_MULTIPLIERS = np.random.PCG64(0).random_raw(BANDS * BAND_ROWS) | np.uint64(1)


def _signature(shingles: np.ndarray) -> np.ndarray:
    """MinHash: the smallest value of the shingles under each of BANDS * BAND_ROWS hash functions."""
    mixed = shingles[:, None] * _MULTIPLIERS
    mixed ^= mixed >> np.uint64(32)
    return (mixed * np.uint64(0xD6E8FEB86659FD93)).min(axis=0)


def _candidates(signatures: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (later, earlier) that agree in a whole band: each with the band's first and with the one before."""
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS if len(signatures) else 0):
        part = np.ascontiguousarray(signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS])
        keys = part.view(np.dtype((np.void, part.itemsize * BAND_ROWS))).ravel()
        _, groups = np.unique(keys, return_inverse=True)
        order = np.argsort(groups, kind="stable")
        first = order[0]
        for before, later in zip(order[:-1].tolist(), order[1:].tolist(), strict=True):
            if groups[before] != groups[later]:
                first = later
            else:
                pairs |= {(later, int(first)), (later, before)}
    return pairs


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets of shingles."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
