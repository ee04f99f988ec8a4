"""What must hold before a teacher is asked: it is causal, and packed rows get the logits of each document alone.

Both are found out by asking. A fault may show only where a document is longer than a sliding window, a chunk or the
length at which positions are scaled otherwise (longrope), or where rows begin with another document, so the rows that
are asked are those with the longest, the most and the shortest pieces. What counts is the largest difference.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indraquantum.data.split import Batch

if TYPE_CHECKING:
    import torch

    from indraquantum.data.dataset import PreparedDataset
    from indraquantum.data.split import Split
    from indraquantum.teacher.teacher_model import Teacher


class _Rounding(NamedTuple):
    """What rounding alone may do in a number format, as a share of the logits' spread."""

    positions: int  # neighbours of which the median counts: in 16 bits a near tie sends a token to another expert
    packed: float  # other products and other kernels round otherwise
    causal: float  # the same shapes give the same bits, but for experts that get other numbers of tokens


_ROUNDING = {
    "float32": _Rounding(1, 1e-3, 2e-5),
    "bfloat16": _Rounding(8, 0.1, 0.05),
    "float16": _Rounding(8, 0.05, 0.02),
}


def _rounding(teacher: Teacher) -> _Rounding:
    """What rounding may do to this teacher's logits; that of 8 bits (bitsandbytes) looks at all rows of a batch."""
    quantised = getattr(teacher.model.config, "quantization_config", None) is not None
    return _ROUNDING["bfloat16" if quantised else teacher.precision]


def telling_rows(dataset: PreparedDataset) -> Batch:
    """Up to three rows of either split that can show a fault, without the columns that are padding in all of them.

    They are the row with the longest piece (where there are several, the one that begins latest in its row), the row
    of the most pieces, and the row with the shortest.
    """
    found = [_telling(dataset.train), _telling(dataset.validation)]
    best = [max(candidates, key=lambda row: row.score) for candidates in zip(*found, strict=True)]
    chosen = {(id(row.split), row.number): row for row in best}.values()
    batches = [row.split.batch(np.array([row.number])) for row in chosen]
    rows = Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    width = int((rows.segments >= 0).sum(1).max())
    return Batch(*(array[:, :width] for array in rows))


class _Row(NamedTuple):
    score: tuple[int, ...]
    split: Split
    number: int


def _telling(split: Split) -> list[_Row]:
    """The rows of one split with the longest piece, the most pieces, and the shortest piece."""
    lengths, counts = split.pieces[:, 1], np.diff(split.row_pieces)
    row_of_piece = np.repeat(np.arange(split.num_rows), counts)
    starts = np.cumsum(lengths) - lengths - split.row_token_offsets[row_of_piece]
    longest = np.lexsort((starts, lengths))[-1]
    most, shortest = counts.argmax(), lengths.argmin()
    return [
        _Row((int(lengths[longest]), int(starts[longest])), split, int(row_of_piece[longest])),
        _Row((int(counts[most]),), split, int(most)),
        _Row((-int(lengths[shortest]),), split, int(row_of_piece[shortest])),
    ]


def is_causal(teacher: Teacher, ids_T: np.ndarray) -> bool:
    """Whether the logits at a position stay what they are when later tokens change.

    Args:
        teacher: loaded.
        ids_T: (T,) a document, or the part of one that lies in a row.
    """
    import torch

    rounding = _rounding(teacher)
    changed_T = np.roll(ids_T, 1)
    changed_T = np.where(changed_T == ids_T, (ids_T + 1) % teacher.vocabulary_size, changed_T)
    before_TV = teacher.alone(ids_T)
    apart = []
    for first in sorted({len(ids_T) // 2, len(ids_T) - 2, len(ids_T) - 1} - {-1, 0}):
        after_TV = teacher.alone(np.concatenate([ids_T[:first], changed_T[first:]]))
        apart.append(differences(after_TV[:first], before_TV[:first]))
    if apart:
        apart.append(torch.stack([apart_T[-1] for apart_T in apart]))  # who sees one token ahead shows it here alone
    return all(_largest(apart_T, rounding.positions) <= rounding.causal for apart_T in apart)


def packs_right(teacher: Teacher, batch: Batch) -> bool:
    """Whether packed rows give the logits of each document alone; False where the teacher does not take them at all."""
    rounding = _rounding(teacher)
    try:
        packed_BTV = teacher.packed_logits(batch)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError):
        return False  # an architecture that can't take such a mask says so in many ways
    for row, columns in pieces_of(batch):
        packed_TV = packed_BTV[row, columns, : teacher.vocabulary_size]
        apart_T = differences(packed_TV, teacher.alone(batch.input_ids[row, columns]))
        if not _largest(apart_T, rounding.positions) <= rounding.packed:
            return False
    return True


def pieces_of(batch: Batch) -> Iterator[tuple[int, slice]]:
    """The documents, or parts of documents, of a batch: each one's row and columns."""
    for row, segments_T in enumerate(batch.segments):
        for segment in range(segments_T.max() + 1):
            columns = np.flatnonzero(segments_T == segment)
            yield row, slice(columns[0], columns[-1] + 1)


def differences(logits_TV: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """How far the logits of a piece lie from the reference's: root mean square over the vocabulary.

    Returns:
        (T,) float32, as a share of the reference's spread; nan where only one of the two is finite.
    """
    import torch

    logits_TV, reference_TV = logits_TV.float(), reference_TV.float()
    spread = reference_TV[reference_TV.isfinite()].std().clamp(min=torch.finfo(torch.float32).tiny)
    apart_TV = torch.where(logits_TV == reference_TV, 0, logits_TV - reference_TV)  # both may exclude a token by -inf
    return apart_TV.square().mean(-1).sqrt() / spread


def _largest(apart_T: torch.Tensor, positions: int) -> float:
    """The largest difference, where each run of `positions` neighbours counts by its median; nan if one is nan."""
    begins = [*range(len(apart_T) - positions, 0, -positions), 0]
    return float(apart_T.new_tensor([apart_T[begin : begin + positions].median() for begin in begins]).max())
