"""One split of a dataset: a stream of documents, cut into pieces that form rows. Rows are gathered as batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

IGNORED = -100  # PyTorch's ignore_index: a position without a label


class Batch(NamedTuple):
    """Rows ready for a model: int64 arrays of shape (B, T)."""

    input_ids: np.ndarray  # padding has EOS's id; `segments`, not the id, marks real tokens
    labels: np.ndarray  # next token of the same document; -100 at a document's end and on padding
    positions: np.ndarray  # place within the piece, from 0; 0 on padding
    segments: np.ndarray  # number of the piece within its row; -1 on padding
    sources: np.ndarray  # number of the document's source; -1 on padding
    index: np.ndarray  # place among the split's real tokens in row order, as signals are stored; -1 on padding

    @property
    def labelled(self) -> np.ndarray:
        """Where there is a label, (B, T) bool."""
        return self.labels >= 0


@dataclass(frozen=True, eq=False)
class Split:
    """One part of the dataset: training, validation or test."""

    tokens: np.ndarray  # (S,) uint16 or uint32
    document_offsets: np.ndarray  # (documents + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]]
    document_sources: np.ndarray  # (documents,) uint8
    pieces: np.ndarray  # (P, 2) int64: start in the stream, length
    row_pieces: np.ndarray  # (R + 1,) int64: row r is pieces[row_pieces[r]:row_pieces[r + 1]]
    row_length: int  # T
    padding_id: int  # EOS's id
    # (documents,) int64: place of the document in its source, from 0; empty if it is not known
    document_numbers: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    # (P,) int64 for a part of another split: the place of each piece there, as in Batch.index
    places_elsewhere: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_pieces) - 1

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_offsets) - 1

    def label_counts(self, vocabulary_size: int) -> np.ndarray:
        """Return how often each token is predicted, (V,) int64: everywhere but at the beginning of a document."""
        used, firsts = self.tokens, self.document_offsets[:-1]
        if self.places_elsewhere is not None:
            used = used[np.repeat(self.has_document, np.diff(self.document_offsets))]
            firsts = firsts[self.has_document]
        counts_V = np.bincount(used, minlength=vocabulary_size)
        return counts_V - np.bincount(self.tokens[firsts], minlength=vocabulary_size)

    @cached_property
    def has_document(self) -> np.ndarray:
        """Whether it has each document of the stream, (documents,) bool; a part of another split lacks some."""
        if self.places_elsewhere is None:
            return np.ones(self.num_documents, dtype=bool)
        return np.isin(np.arange(self.num_documents), self.piece_documents)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens, including control tokens."""
        return int(self.row_token_offsets[-1])

    @cached_property
    def piece_places(self) -> np.ndarray:
        """Place of each piece's first token among the real tokens in row order, as signals are stored, (P,) int64."""
        lengths = self.pieces[:, 1]
        return np.cumsum(lengths) - lengths if self.places_elsewhere is None else self.places_elsewhere

    @cached_property
    def row_token_offsets(self) -> np.ndarray:
        """Number of real tokens before each row, (R + 1,) int64."""
        lengths = np.concatenate([[0], np.cumsum(self.pieces[:, 1])])
        return lengths[self.row_pieces]

    @cached_property
    def piece_documents(self) -> np.ndarray:
        """Number of the document of each piece, (P,) int64."""
        return self._documents_at(self.pieces[:, 0])

    def _documents_at(self, places: np.ndarray) -> np.ndarray:
        """Documents that hold these places of the stream."""
        return np.searchsorted(self.document_offsets, places, side="right") - 1

    def batch(self, rows: np.ndarray) -> Batch:
        """Gather rows.

        Args:
            rows: Numbers of the rows, (B,) integers in [0, num_rows).

        Returns:
            The batch, in the order asked for.
        """
        rows = np.asarray(rows, dtype=np.int64)
        first = self.row_pieces[rows]
        counts = self.row_pieces[rows + 1] - first
        segments = _ranges(counts)  # number of each piece within its row
        piece = np.repeat(first, counts) + segments
        starts, lengths = self.pieces[piece, 0], self.pieces[piece, 1]
        documents = self._documents_at(starts)

        # From here on one entry for each real token.
        per_row = self.row_token_offsets[rows + 1] - self.row_token_offsets[rows]
        columns = _ranges(per_row)
        place = np.repeat(np.arange(len(rows)), per_row) * self.row_length + columns
        positions = _ranges(lengths)
        stream = np.repeat(starts, lengths) + positions
        following = stream + 1
        ended = following == np.repeat(self.document_offsets[documents + 1], lengths)
        labels = self.tokens[np.where(ended, stream, following)].astype(np.int64)
        labels[ended] = IGNORED

        def scatter(values: np.ndarray, padding: int) -> np.ndarray:
            out = np.full(len(rows) * self.row_length, padding, dtype=np.int64)
            out[place] = values
            return out.reshape(len(rows), self.row_length)

        return Batch(
            input_ids=scatter(self.tokens[stream], self.padding_id),
            labels=scatter(labels, IGNORED),
            positions=scatter(positions, 0),
            segments=scatter(np.repeat(segments, lengths), -1),
            sources=scatter(np.repeat(self.document_sources[documents], lengths), -1),
            index=scatter(np.repeat(self.piece_places[piece], lengths) + positions, -1),
        )


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0..counts[0]-1, 0..counts[1]-1, and so on, end to end."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
