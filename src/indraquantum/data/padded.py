"""The padded layout: a pickle with a list of `{"input_ids", "attention_mask"}`, one sample a row.

Each sample is cut at the row's length, or padded with EOS's id and mask 0. The mask, not the id, marks real tokens.
"""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indraquantum.data.held_out import VALIDATION, choose_held_out
from indraquantum.data.prepared import PreparedDataset, check_split, content_hash
from indraquantum.data.safe_pickle import load_plain_pickle
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import check_manifest_json, read_json, sha256_of, unreadable, write_manifest_json
from indraquantum.progress import warn

PROTOCOL = 4  # read by every Python since 3.4; a fixed number keeps the bytes the same
KEYS = (b"input_ids", b"attention_mask")
CHUNK_ROWS = 4096  # rows written at once
SOURCE = "pickle"  # the format has no room for sources


def write_padded(path: Path, documents: Iterable[np.ndarray], row_length: int, padding_id: int) -> None:
    """Write documents as padded rows, a chunk at a time. The same documents give the same bytes.

    Every row has the same number of bytes, so NumPy can write the pickle's opcodes for thousands of rows at once.

    Args:
        path: The pickle.
        documents: Token ids of each document, in the order of the rows.
        row_length: Length of every row.
        padding_id: The id that fills a row, at mask 0.
    """
    remaining = iter(documents)
    with open(path, "wb") as file:
        file.write(pickle.PROTO + bytes([PROTOCOL]))
        for key in KEYS:  # into the pickle's memo, which every row refers to
            file.write(pickle.SHORT_BINUNICODE + bytes([len(key)]) + key + pickle.MEMOIZE + pickle.POP)
        file.write(pickle.EMPTY_LIST)
        while chunk := list(itertools.islice(remaining, CHUNK_ROWS)):
            file.write(pickle.MARK + _records(chunk, row_length, padding_id).tobytes() + pickle.APPENDS)
        file.write(pickle.STOP)


def checksum_path(path: Path) -> Path:
    """Return the path of the small JSON file beside a pickle that holds its size and checksum."""
    return path.with_name(f"{path.name}.json")


def write_checksum(path: Path, digest: str) -> None:
    """Write a pickle's size and its SHA-256 `digest` beside it."""
    facts = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
    write_manifest_json(checksum_path(path), facts)


def verify_checksum(field: str, path: Path) -> bool:
    """Check every byte of a pickle against the checksum beside it; return whether there is a checksum.

    Raises:
        UserError: the pickle or the file with its checksum is damaged.
    """
    there = checksum_path(path)
    if not there.exists():
        return False
    check_manifest_json(field, there)
    facts = read_json(field, there)
    if (facts.get("file"), facts.get("bytes"), facts.get("sha256")) != (
        path.name, path.stat().st_size, sha256_of(path),
    ):  # fmt: skip
        allowed = (
            f"is damaged: its size or SHA-256 is not the one in {there.name}; if you changed it on "
            f"purpose, remove {there.name}"
        )
        raise UserError(field, path, allowed)
    return True


def _records(documents: Sequence[np.ndarray], row_length: int, padding_id: int) -> np.ndarray:
    """Rows as the pickle's own bytes, (rows,) of a structured type."""
    lengths = np.array([min(len(document), row_length) for document in documents])
    real = np.arange(row_length) < lengths[:, None]
    ids = np.full(real.shape, padding_id, dtype=np.int64)
    ids[real] = np.concatenate([document[:row_length] for document in documents])
    wide = int(ids.max()) >= 1 << 16
    before = pickle.MARK + pickle.BINGET
    parts = {
        "open": pickle.EMPTY_DICT + before + b"\0" + pickle.EMPTY_LIST + pickle.MARK,
        "ids": (pickle.BININT if wide else pickle.BININT2, "<i4" if wide else "<u2", ids),
        "between": pickle.APPENDS + pickle.BINGET + b"\1" + pickle.EMPTY_LIST + pickle.MARK,
        "mask": (pickle.BININT1, "u1", real),
        "close": pickle.APPENDS + pickle.SETITEMS,
    }
    kinds = [
        (name, f"S{len(part)}") if isinstance(part, bytes) else (name, [("op", "S1"), ("value", part[1])], row_length)
        for name, part in parts.items()
    ]
    records = np.empty(len(documents), dtype=kinds)
    for name, part in parts.items():
        if isinstance(part, bytes):
            records[name] = part
        else:
            records[name]["op"], records[name]["value"] = part[0], part[2]
    return records


def open_pickle(field: str, path: Path, tokenizer: str | TextTokenizer | None) -> PreparedDataset:
    """Open a pickle of padded rows as a dataset: one document a row.

    1 % of the rows, chosen by their hash, become the validation split. There is no test split.

    Args:
        field: The option to name in an error.
        path: The pickle. If there is a checksum beside it, every byte is checked first. Further keys of a row are not
            used; the manifest's `unused_fields` counts them, and a line on stderr says so.
        tokenizer: A folder, a file, a hub id, or the tokenizer itself.

    Raises:
        UserError: there is no tokenizer, the file is not a plain pickle, a row has another form, or an id is outside
            the vocabulary.
    """
    if tokenizer is None:
        raise UserError("--tokenizer", None, f"must be given, because the pickle {path} has no tokenizer of its own")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer("--tokenizer", tokenizer)
    try:
        verify_checksum(field, path)
    except OSError as error:
        raise unreadable(field, path, error) from None
    content = load_plain_pickle(field, path)
    rows = _check_rows(field, path, content, tokenizer.vocabulary_size)
    tokenizer = _beginning_as(rows.documents, tokenizer)
    row_length = rows.row_length
    unused = Counter(str(key) for row in content for key in row if key not in ("input_ids", "attention_mask"))
    for key, count in unused.items():
        instead = "; every real token is a label" if key == "labels" else ""
        warn(f"note: {path}: {count:,} rows have {key!r}, which is not used{instead}")
    held = choose_held_out([[document.tobytes() for document in rows.documents]])[0] == VALIDATION
    if not held.any():
        raise UserError(field, path, "must hold at least 2 different rows, because 1 is held out")
    splits = {}
    for name, keep in (("train", ~held), ("validation", held)):
        documents = [document for document, kept in zip(rows.documents, keep, strict=True) if kept]
        if max(map(len, documents)) < 2:
            where = "that are held out" if name == "validation" else "to train on"
            raise UserError(
                field,
                path,
                f"must have a row of at least 2 tokens among those {where}: a single token has nothing to predict",
            )
        splits[name] = _one_document_a_row(documents, row_length, tokenizer)
        check_split(field, path, splits[name], tokenizer.vocabulary_size, 1)
    digest = content_hash(splits, [SOURCE], tokenizer)
    manifest = {
        "format": "padded pickle",
        "row_length": row_length,
        "vocabulary_size": tokenizer.vocabulary_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "content_sha256": digest,
        "sources": [
            {
                "name": SOURCE,
                "documents": len(held),
                "validation_documents": int(held.sum()),
                "unused_fields": dict(unused),
            }
        ],
    }
    return PreparedDataset(splits["train"], splits["validation"], row_length, (SOURCE,), tokenizer, digest, manifest)


def _beginning_as(documents: list[np.ndarray], tokenizer: TextTokenizer) -> TextTokenizer:
    """Return the tokenizer with the control token that all rows begin with as its BOS, or without one."""
    firsts = {int(document[0]) for document in documents}
    bos_id = firsts.pop() if len(firsts) == 1 and firsts <= set(tokenizer.control_ids) else None
    return tokenizer if bos_id == tokenizer.bos_id else TextTokenizer(tokenizer.backend, bos_id, tokenizer.eos_id)


def _one_document_a_row(documents: list[np.ndarray], row_length: int, tokenizer: TextTokenizer) -> Split:
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Split(
        tokens=np.concatenate(documents).astype(tokenizer.dtype),
        document_offsets=offsets,
        document_sources=np.zeros(len(documents), dtype=np.uint8),
        pieces=np.stack([offsets[:-1], lengths], axis=1),
        row_pieces=np.arange(len(documents) + 1, dtype=np.int64),
        row_length=row_length,
        padding_id=tokenizer.eos_id,
    )


class _Rows(NamedTuple):
    """The checked content of a pickle."""

    documents: list[np.ndarray]  # the real tokens of each row
    row_length: int


def _check_rows(field: str, path: Path, rows: Any, vocabulary_size: int) -> _Rows:
    """Take the real tokens out of each row, or name the first row that is wrong (counted from 0)."""
    if not isinstance(rows, list) or not rows:
        raise UserError(field, path, "must hold a list of at least one row")
    documents: list[np.ndarray] = []
    row_length = None
    for number, row in enumerate(rows):
        ids, mask = (_integers(field, path, number, row, key) for key in ("input_ids", "attention_mask"))
        row_length = len(ids) if row_length is None else row_length
        if len(ids) != row_length or len(mask) != row_length:
            found = f"{len(ids)} ids and {len(mask)} mask entries"
            raise UserError(field, path, f"row {number} has {found}; all rows must be {row_length} long")
        real = int((mask == 1).sum())
        if real == 0 or not ((mask[:real] == 1).all() and (mask[real:] == 0).all()):
            raise UserError(field, path, f"row {number}: attention_mask must be one or more ones, followed by zeros")
        if ids.min() < 0 or ids.max() >= vocabulary_size:
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            allowed = f"row {number} holds token id {wrong}; ids must be from 0 to {vocabulary_size - 1}"
            raise UserError(field, path, allowed)
        documents.append(ids[:real].astype(np.int64))
    return _Rows(documents, int(row_length or 0))


def _integers(field: str, path: Path, number: int, row: Any, key: str) -> np.ndarray:
    values = row.get(key) if isinstance(row, dict) else None
    # type and not isinstance: True would pass as 1 and say nothing.
    if not isinstance(values, list) or not values or set(map(type, values)) != {int}:
        raise UserError(field, path, f"row {number} must be a dict whose {key} is a list of integers")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise UserError(field, path, f"row {number}: {key} holds a number of more than 64 bits") from None
