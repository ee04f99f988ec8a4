"""Packs documents into rows of one length, so that every token is used once and hardly any position is padding.

The method is best-fit decreasing: each document goes where it leaves the least room. A document that fits into a row is
never split. Longer documents must be split, and their pieces fill the gaps. Rows are found by their free room, which is
at most the row's length, so the work grows only with the number of documents. The code is our own, because every token
must be used exactly once, and the same documents must always give the same rows.

Letters: P pieces, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from indraquantum.data.split import Split

# The first tokens of a piece see little of their document, so a long document is not cut into tiny pieces to save
# padding: pieces that fill a gap have at least this many tokens (fewer for rows below 128).
SHORTEST_CUT = 8


class Packing(NamedTuple):
    """Which piece of which document lies in which row."""

    documents: np.ndarray  # (P,) int64: number of the piece's document
    pieces: np.ndarray  # (P, 2) int64: start within the document, length
    row_pieces: np.ndarray  # (R + 1,) int64: row r is pieces[row_pieces[r]:row_pieces[r + 1]]


class _Rows:
    """Rows being filled, found by their free room."""

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.contents: list[list[int]] = []  # pieces of each row
        self._by_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows with that much room
        self._rooms = (
            0  # bit n is set if some row has room n, so the next larger room is found by one integer operation
        )

    def place(self, piece: int, length: int) -> None:
        """Put a piece where it leaves the least room, in a new row if it must."""
        larger = self._rooms >> length
        if larger:
            room = length + (larger & -larger).bit_length() - 1
            self._put(piece, length, room)
        else:
            self.contents.append([piece])
            self._add(len(self.contents) - 1, self.row_length - length)

    def largest_room(self, limit: int) -> int:
        """Return the largest room that is at most `limit`; 0 if there is none."""
        # Bit 0 is never set, so no room at all gives bit_length 0.
        return max((self._rooms & ((2 << limit) - 1)).bit_length() - 1, 0)

    def _put(self, piece: int, length: int, room: int) -> None:
        row = self._by_room[room].pop()
        if not self._by_room[room]:
            self._rooms &= ~(1 << room)
        self.contents[row].append(piece)
        self._add(row, room - length)

    def _add(self, row: int, room: int) -> None:
        if room:
            self._by_room[room].append(row)
            self._rooms |= 1 << room


def pack(lengths: np.ndarray, row_length: int) -> Packing:
    """Pack documents into rows.

    Args:
        lengths: Tokens of each document, (documents,) integers above 0.
        row_length: Positions of a row.

    Returns:
        Pieces that hold every token of every document exactly once. The result depends on the arguments only.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = _Rows(row_length)
    pieces: list[tuple[int, int, int]] = []  # document, start, length

    def place(document: int, start: int, length: int) -> None:
        rows.place(len(pieces), length)
        pieces.append((document, start, length))

    whole = np.flatnonzero(lengths <= row_length)
    for document in whole[np.argsort(-lengths[whole], kind="stable")].tolist():
        place(document, 0, int(lengths[document]))

    # The beginning of a longer document takes whole rows. Its rest is cut where that fills the room of a row exactly.
    longer = np.flatnonzero(lengths > row_length)
    rests = lengths[longer] % row_length
    shortest = max(1, min(SHORTEST_CUT, row_length // 16))
    for at in np.argsort(-rests, kind="stable").tolist():
        document, rest = int(longer[at]), int(rests[at])
        start = int(lengths[document]) - rest
        for own in range(0, start, row_length):
            place(document, own, row_length)
        while rest:
            room = rows.largest_room(rest)
            length = room if shortest <= room <= rest - shortest else rest
            place(document, start, length)
            start, rest = start + length, rest - length

    table = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    order = np.fromiter((piece for row in rows.contents for piece in row), dtype=np.int64, count=len(table))
    sizes = np.fromiter(map(len, rows.contents), dtype=np.int64, count=len(rows.contents))
    row_pieces = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Packing(table[order, 0], table[order, 1:], row_pieces)


def packed_split(tokens: np.ndarray, document_offsets: np.ndarray, row_length: int, padding_id: int) -> Split:
    """Pack documents of one source into a split.

    Args:
        tokens: (S,) their ids end to end.
        document_offsets: (documents + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]].
        row_length: T.
        padding_id: EOS's id.
    """
    packing = pack(np.diff(document_offsets), row_length)
    starts = document_offsets[packing.documents]
    return Split(
        tokens=tokens,
        document_offsets=document_offsets,
        document_sources=np.zeros(len(document_offsets) - 1, np.uint8),
        pieces=packing.pieces + np.stack([starts, np.zeros_like(starts)], axis=1),
        row_pieces=packing.row_pieces,
        row_length=row_length,
        padding_id=padding_id,
    )


def part_of_sources(split: Split, sources: Sequence[int]) -> Split:
    """Return the pieces of some sources, with the places that they have in `split`.

    Rows that hold only these sources stay as they are and come first. Pieces from other rows are packed again.

    Args:
        split: the split that holds them.
        sources: numbers of the sources.
    """
    wanted = np.isin(split.document_sources, sources)[split.piece_documents]  # (P,) bool
    sizes = np.diff(split.row_pieces)
    rows = np.repeat(np.arange(split.num_rows), sizes)  # (P,) the row of each piece
    alone = np.bincount(rows, wanted, split.num_rows) == sizes  # (R,) bool
    kept, rest = np.flatnonzero(alone[rows]), np.flatnonzero(wanted & ~alone[rows])
    packing = pack(split.pieces[rest, 1], split.row_length)
    pieces = np.concatenate([kept, rest[packing.documents]])
    sizes = np.concatenate([sizes[alone], np.diff(packing.row_pieces)])
    return replace(
        split,
        pieces=split.pieces[pieces],
        row_pieces=np.concatenate([[0], np.cumsum(sizes)]),
        places_elsewhere=split.piece_places[pieces],
    )
