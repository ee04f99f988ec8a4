"""Divides the validation documents into two halves: one for choices, the other for the tables of the report.

This separates choice and table within one ablation. Every plan on the same data has the same halves, so a plan that was
made after reading another plan's table is no longer independent of it. The test split (test_split.py) is for a figure
that no choice has looked at.

A hash of its text decides a document's half, so that order, seed and packing have no influence. A row may hold
documents of both halves; each position belongs to the half of its document.

Legend: U documents, N labelled positions, S real tokens in row order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.split import Split
from indraquantum.evaluation.figures import Predictions

Half = Literal["choice", "table"]


def document_texts(dataset: PreparedDataset, split: Split) -> list[bytes]:
    """Return the documents of `split`, which is one of the dataset's, as UTF-8, as their tokens spell them."""
    return [dataset.tokenizer.decode(ids).encode() for ids in _documents(split)]


def _documents(split: Split) -> Iterator[list[int]]:
    """The ids of each document."""
    for start, stop in itertools.pairwise(split.document_offsets.tolist()):
        yield split.tokens[start:stop].tolist()


def documents_of_half(dataset: PreparedDataset, half: Half) -> np.ndarray:
    """Return which held-out documents belong to `half`, (U,) bool.

    The different documents of each source, in the order of their hashes, go to the table and to the choice half in
    turn. Equal documents go to the same half, as documents of the first source that has them.
    """
    hashes = (hashlib.sha256(b"half\0" + text).digest()[:8] for text in document_texts(dataset, dataset.validation))
    keys_U = np.fromiter((int.from_bytes(key, "big") for key in hashes), dtype=np.uint64)
    _, first, kind_U = np.unique(keys_U, return_index=True, return_inverse=True)
    sources = dataset.validation.document_sources[first]  # of the different documents, in the order of their hashes
    chosen = np.zeros(len(first), dtype=bool)
    for source in np.unique(sources):
        chosen[np.flatnonzero(sources == source)[1::2]] = True
    return chosen[kind_U] if half == "choice" else ~chosen[kind_U]


def positions_of_documents(split: Split, documents_U: np.ndarray) -> np.ndarray:
    """Return which real tokens of `split`, in row order, belong to the chosen documents: (S,) bool, as signals are."""
    return np.repeat(documents_U[split.piece_documents], split.pieces[:, 1])


def of_documents(found: Predictions, split: Split, documents_U: np.ndarray) -> Predictions:
    """Return the predictions about `split` that belong to the chosen documents."""
    here_N = positions_of_documents(split, documents_U)[found.index_N]
    return Predictions(*(column[here_N] for column in found))


def bytes_by_source(dataset: PreparedDataset, split: Split, documents_U: np.ndarray | None = None) -> dict[str, int]:
    """Return for each source the UTF-8 bytes that are predicted in the documents of `split`, or in the chosen ones."""
    sizes_U = np.array([dataset.tokenizer.count_bytes(ids) for ids in _documents(split)], dtype=np.int64)
    sizes_U -= np.array([dataset.tokenizer.unpredicted_bytes(ids) for ids in _documents(split)], dtype=np.int64)
    if documents_U is not None:
        sizes_U[~documents_U] = 0
    sources_U = split.document_sources
    return {name: int(sizes_U[sources_U == number].sum()) for number, name in enumerate(dataset.source_names)}
