"""Checks a teacher before it is used: it must be causal, and packed rows must get the logits of each document alone.

Both are measured. A fault may only show where a document is longer than a sliding window, a chunk or the length from
which positions are scaled (longrope), or where a row begins with another document. The rows that are checked are
therefore those with the longest, the most and the shortest pieces. The largest difference decides.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indraquantum.data.split import Batch
from indraquantum.memory import is_out_of_memory
from indraquantum.teacher.teacher_model import Teacher, pieces_of

if TYPE_CHECKING:
    import torch

    from indraquantum.data.prepared import PreparedDataset
    from indraquantum.data.split import Split


class _Rounding(NamedTuple):
    """The differences that rounding alone may cause in a number format, as a share of the logits' spread."""

    positions: int  # neighbours whose median counts: in 16 bits, a near tie can send a token to another expert
    packed: float  # other shapes and kernels round differently
    causal: float  # equal shapes give equal bits, except for experts that get other numbers of tokens


_ROUNDING = {
    "float32": _Rounding(1, 1e-3, 2e-5),
    "bfloat16": _Rounding(8, 0.1, 0.05),
    "float16": _Rounding(8, 0.05, 0.02),
    "mixed": _Rounding(8, 0.1, 0.05),
}


def _rounding(teacher: Teacher) -> _Rounding:
    """Return the differences that rounding may cause in this teacher; 8 bits (bitsandbytes) round over all rows."""
    quantised = getattr(teacher.model.config, "quantization_config", None) is not None
    return _ROUNDING["bfloat16" if quantised else teacher.precision]


def telling_rows(dataset: PreparedDataset) -> Batch:
    """Return up to three rows that can show a fault, without the columns that are padding in all of them.

    They are the row with the longest piece (of several, the one that begins latest in its row), the row with the most
    pieces, and the row with the shortest piece.
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
    """Return the rows of one split with the longest piece, the most pieces, and the shortest piece."""
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
    """Return whether the logits at a position stay the same when later tokens change.

    Args:
        teacher: the loaded teacher.
        ids_T: (T,) the ids of a document, or of the part of it that is in a row.
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
        apart.append(
            torch.stack([apart_T[-1] for apart_T in apart])
        )  # a model that sees only one token ahead shows it only here
    return all(_largest(apart_T, rounding.positions) <= rounding.causal for apart_T in apart)


def packs_right(teacher: Teacher, batch: Batch) -> bool:
    """Return whether packed rows give the logits of each document alone; False if the teacher can't take them.

    Raises:
        Exception: what torch raises if there is no memory left; see `is_out_of_memory`.
    """
    rounding = _rounding(teacher)
    try:
        packed_BTV = teacher.packed_logits(batch)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        if is_out_of_memory(error):  # a RuntimeError too, but it says nothing about documents
            raise
        return False  # architectures that can't take such a mask raise many kinds of errors
    for row, columns in pieces_of(batch):
        packed_TV = packed_BTV[row, columns, : teacher.vocabulary_size]
        apart_T = differences(packed_TV, teacher.alone(batch.input_ids[row, columns]))
        if not _largest(apart_T, rounding.positions) <= rounding.packed:
            return False
    return True


def differences(logits_TV: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """Return how far the logits of a piece are from a reference: the root mean square over the vocabulary.

    Returns:
        (T,) float32, as a share of the reference's spread; nan if only one of the two is finite.
    """
    import torch

    logits_TV, reference_TV = logits_TV.float(), reference_TV.float()
    spread = reference_TV[reference_TV.isfinite()].std().clamp(min=torch.finfo(torch.float32).tiny)
    apart_TV = torch.where(logits_TV == reference_TV, 0, logits_TV - reference_TV)  # both may exclude a token by -inf
    return apart_TV.square().mean(-1).sqrt() / spread


def _largest(apart_T: torch.Tensor, positions: int) -> float:
    """Return the largest median of `positions` neighbouring differences; nan if one is nan."""
    begins = [*range(len(apart_T) - positions, 0, -positions), 0]
    return float(apart_T.new_tensor([apart_T[begin : begin + positions].median() for begin in begins]).max())
