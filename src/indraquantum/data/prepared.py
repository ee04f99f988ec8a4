"""What a prepared dataset is: immutable rows of tokens, with everything that a training step needs.

Letters: S tokens of a stream, P pieces, R rows, B rows of a batch, T positions of a row.

A split is one stream of tokens, all documents one after the other, and a table of pieces of that stream. A row consists
of some pieces. Segments, positions and labels keep the documents of a row apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from indraquantum.data.held_out import SPLITS
from indraquantum.data.large_arrays import chunks
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError

DTYPES = {
    "tokens": (np.uint16, np.uint32),
    "document_offsets": (np.int64,),
    "document_sources": (np.uint8,),
    "document_numbers": (np.int64,),
    "pieces": (np.int64,),
    "row_pieces": (np.int64,),
}
ARRAYS = tuple(DTYPES)


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """A dataset that is open for reading.

    Training and captures read `train` and `validation`. `test` is for a final report alone.
    """

    train: Split
    validation: Split
    row_length: int
    source_names: tuple[str, ...]
    tokenizer: TextTokenizer
    content_sha256: str  # over all arrays and the tokenizer: signals belong to exactly one dataset
    manifest: dict[str, Any]
    test: Split | None = None  # None in datasets of version 2, in pickles, and if the sources were too small

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that the dataset has, by name."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in named.items() if split is not None}


def content_hash(splits: dict[str, Split], source_names: Sequence[str], tokenizer: TextTokenizer) -> str:
    """Return the hex SHA-256 over every array, the names of the sources and the tokenizer."""
    digest = hashlib.sha256(json.dumps([tokenizer.sha256, list(source_names)]).encode())
    for name in (name for name in SPLITS if name in splits):
        split = splits[name]
        digest.update(json.dumps([name, split.row_length, split.padding_id]).encode())
        for array in ARRAYS:
            values = getattr(split, array)
            digest.update(json.dumps([array, values.dtype.str, values.shape]).encode())
            for chunk in chunks(values):
                digest.update(chunk.data)
    return digest.hexdigest()


def largest_id(split: Split) -> int:
    """Return the largest token id in a split."""
    return max(int(part.max()) for part in chunks(split.tokens))


def _needer(field: str, where: object) -> Callable[[bool, str], None]:
    """Return a function that raises a UserError unless its condition holds."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(field, where, f"is damaged: {what}")

    return need


def check_largest(field: str, where: object, largest: int, vocabulary_size: int) -> None:
    """Check that the largest id of a split is one of the vocabulary.

    Raises:
        UserError: it is not; `field` is the option and `where` the place to name.
    """
    if largest >= vocabulary_size:
        raise UserError(field, where, f"holds token id {largest}; ids must be below the vocabulary's {vocabulary_size}")


def check_shapes(field: str, where: object, split: Split) -> None:
    """Check types, shapes and ends of the arrays. This takes the same time for any size.

    Raises:
        UserError: naming what is wrong; `field` is the option and `where` the place to name.
    """
    need = _needer(field, where)
    offsets, pieces, rows = split.document_offsets, split.pieces, split.row_pieces
    need(split.tokens.dtype in DTYPES["tokens"], "tokens must be uint16 or uint32")
    need(all(getattr(split, name).dtype in DTYPES[name] for name in ARRAYS), "an array has the wrong type")
    dimensions = [getattr(split, name).ndim for name in ARRAYS]
    need(dimensions == [1, 1, 1, 1, 2, 1] and pieces.shape[1] == 2, "an array has the wrong shape")
    need(len(offsets) > 1 and len(rows) > 1, "it holds no documents")
    need(offsets[0] == 0 and offsets[-1] == len(split.tokens), "documents do not cover the tokens")
    need(len(split.document_sources) == len(offsets) - 1, "documents and their sources differ in number")
    need(len(split.document_numbers) in (0, len(offsets) - 1), "documents and their numbers differ in number")
    need(rows[0] == 0 and rows[-1] == len(pieces), "rows do not cover the pieces")


def check_split(field: str, where: object, split: Split, vocabulary_size: int, num_sources: int) -> None:
    """Check that the arrays fit together and that every id is one of the vocabulary.

    Raises:
        UserError: naming what is wrong; `field` is the option and `where` the place to name.
    """
    check_shapes(field, where, split)
    need = _needer(field, where)
    offsets, pieces, rows = split.document_offsets, split.pieces, split.row_pieces
    need(bool((np.diff(offsets) > 0).all()), "a document is empty")
    need(int(split.document_sources.max()) < num_sources, "a document's source is unknown")
    need(bool((np.diff(rows) > 0).all()), "rows do not cover the pieces")
    need(bool((pieces[:, 0] >= 0).all() and (pieces[:, 1] > 0).all()), "a piece is empty or out of range")
    ends = pieces.sum(axis=1)
    need(bool((ends <= len(split.tokens)).all()), "a piece is out of range")
    need(bool((ends <= offsets[split.piece_documents + 1]).all()), "a piece crosses a document's end")
    need(int(pieces[:, 1].sum()) == len(split.tokens), "pieces do not cover the tokens")
    need(int(np.diff(split.row_token_offsets).max()) <= split.row_length, "a row is longer than row_length")
    check_largest(field, where, largest_id(split), vocabulary_size)


def check_control_tokens(field: str, where: object, split: Split, tokenizer: TextTokenizer) -> None:
    """Check that every document begins with BOS, if the tokenizer has one, and ends with EOS.

    Raises:
        UserError: naming what is wrong; `field` is the option and `where` the place to name.
    """
    need = _needer(field, where)
    first, behind = split.document_offsets[:-1], split.document_offsets[1:]
    if tokenizer.bos_id is not None:
        begin = (split.tokens[first] == tokenizer.bos_id).all()
        need(bool(begin), f"a document does not begin with bos_id {tokenizer.bos_id}")
    end = (split.tokens[behind - 1] == tokenizer.eos_id).all()
    need(bool(end), f"a document does not end with eos_id {tokenizer.eos_id}")
