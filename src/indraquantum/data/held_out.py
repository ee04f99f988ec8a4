"""Which documents are held out: by a hash of the document, so that neither order nor seed nor position decides.

Documents that share a paragraph are chosen together or not at all, so that nothing held out has been trained on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

FRACTION_PERCENT = 1
AT_LEAST = 4


def choose_held_out(
    sources: Iterable[Iterable[bytes]], paragraphs: Sequence[Sequence[Sequence[str]]] | None = None
) -> list[np.ndarray]:
    """Choose the held-out documents of each source.

    In each source 1 % of its different documents are held out, those with the smallest hashes: at least 4, but never
    more than half of them, so that a source of 1 document has none. Equal documents, and those that share a paragraph,
    go the same way, whatever their source; a family of such documents that is too large to be held out is passed over.

    Args:
        sources: For each source its documents, as bytes.
        paragraphs: For each document of each source the paragraphs it must not share with the other side.

    Returns:
        For each source a boolean array, True where the document is held out.
    """
    hashes = [[hashlib.sha256(b"held out\0" + document).digest() for document in source] for source in sources]
    family_of = _families(hashes, paragraphs)
    sizes: dict[bytes, int] = defaultdict(int)  # different documents of each family
    for digest in {digest for source in hashes for digest in source}:
        sizes[family_of[digest]] += 1
    chosen: set[bytes] = set()
    for source in hashes:
        different = sorted(set(source))
        wanted = min(max(-(-len(different) * FRACTION_PERCENT // 100), AT_LEAST), len(different) // 2)
        taken: dict[bytes, bool] = {}
        for digest in different:
            family = family_of[digest]
            if family not in taken:
                taken[family] = sizes[family] <= wanted
                wanted -= sizes[family] if taken[family] else 0
        chosen.update(family for family, held in taken.items() if held)
    return [np.array([family_of[digest] in chosen for digest in source], dtype=bool) for source in hashes]


def _families(
    hashes: Sequence[Sequence[bytes]], paragraphs: Sequence[Sequence[Sequence[str]]] | None
) -> dict[bytes, bytes]:
    """The family of each document: one hash for all that hang together by shared paragraphs (union-find)."""
    parent = {digest: digest for source in hashes for digest in source}

    def root(digest: bytes) -> bytes:
        while parent[digest] != digest:
            parent[digest] = parent[parent[digest]]
            digest = parent[digest]
        return digest

    owner: dict[bytes, bytes] = {}  # a document that has the paragraph
    for digests, documents in zip(hashes, paragraphs or [], strict=paragraphs is not None):
        for digest, document in zip(digests, documents, strict=True):
            for paragraph in document:
                key = hashlib.sha256(paragraph.encode()).digest()[:16]
                parent[root(digest)] = root(owner.setdefault(key, digest))
    return {digest: root(digest) for digest in parent}
