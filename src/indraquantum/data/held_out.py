"""Which documents are held out: by a hash of the document, so that neither order nor seed nor position decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

FRACTION_PERCENT = 1
AT_LEAST = 4


def choose_held_out(sources: Iterable[Iterable[bytes]]) -> list[np.ndarray]:
    """Choose the held-out documents of each source.

    In each source the 1 % of its different documents with the smallest hashes are held out: at least 4, but never more
    than half of them, so that a source of 1 document has none. Equal documents go the same way, whatever their source:
    what is held out anywhere is in no training row.

    Args:
        sources: For each source its documents, as bytes.

    Returns:
        For each source a boolean array, True where the document is held out.
    """
    hashes = [[hashlib.sha256(b"held out\0" + document).digest() for document in source] for source in sources]
    chosen: set[bytes] = set()
    for source in hashes:
        different = sorted(set(source))
        percent = -(-len(different) * FRACTION_PERCENT // 100)
        chosen.update(different[: min(max(percent, AT_LEAST), len(different) // 2)])
    return [np.array([value in chosen for value in source], dtype=bool) for source in hashes]
