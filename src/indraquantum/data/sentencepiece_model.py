"""Converts a SentencePiece file (tokenizer.model) to a tokenizer.json that gives the same ids.

The conversion is our own, because that of transformers 5.23 gets two things wrong. First, merges must be ordered by the
pieces' scores and, where scores are equal, by the longer left part; this is how SentencePiece merges runs of spaces.
Second, the space before the first word also goes before texts that begin with a space. Control tokens are left out of
the merges, and unigram scores keep them from being used, because SentencePiece never finds them in text.

The file is a protobuf message of three parts. They are read here, because sentencepiece's own reader needs the protobuf
library, which is not among sentencepiece's dependencies.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum.errors import UserError
from indraquantum.files import unreadable

# Numbers of the fields and values in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # SentencePiece's own sign for a space
UNKNOWN_PENALTY = 10.0  # the score of an unknown character is this much below the lowest score


class Converted(NamedTuple):
    """A SentencePiece model in Hugging Face's format."""

    description: dict[str, Any]  # the content of a tokenizer.json
    control_tokens: dict[str, str | None]  # bos_token and eos_token, as in tokenizer_config.json


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int


def convert(field: str, file: Path) -> Converted:
    """Convert the SentencePiece model in `file`, of the kinds bpe and unigram.

    Raises:
        UserError: the file can't be read, is not such a model, or has a feature that a tokenizer.json can't have.
    """
    try:
        parts = _parts(file.read_bytes())
        pieces = [_piece(part) for part in parts[PIECES]]
        trainer, normalizer = (_last(parts.get(name, [b""])[-1]) for name in (TRAINER, NORMALIZER))
        kind = trainer.get(3, UNIGRAM)
        ids = {"bos_token": _signed(trainer.get(41, 1)), "eos_token": _signed(trainer.get(42, 2))}
        control_tokens = {name: pieces[number].text if number >= 0 else None for name, number in ids.items()}
        charsmap = normalizer.get(2, b"")
        if not isinstance(charsmap, bytes):
            raise TypeError("a number in place of bytes")
    except OSError as error:
        raise unreadable(field, file, error) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        raise UserError(field, file, "must be a SentencePiece model; it can't be read as one") from None
    for unfit, what in (
        (kind not in (UNIGRAM, BPE), "is not of the kind bpe or unigram"),
        (all(piece.kind != UNKNOWN for piece in pieces), "has no piece for unknown characters"),
        (any(piece.kind == UNUSED for piece in pieces), "has pieces that are marked as unused"),
        (bool(trainer.get(24)), "puts spaces at the end of words"),
        (not normalizer.get(5, 1), "does not mark spaces"),
    ):
        if unfit:
            raise UserError(field, file, f"{what}, which is not supported; give a tokenizer.json instead")
    normalizers = _normalizers(normalizer, charsmap)
    return Converted(_description(pieces, kind, normalizers, bool(normalizer.get(3, 1))), control_tokens)


def bpe_description(pieces: list[Piece], prefixed: bool) -> dict[str, Any]:
    """Return the tokenizer.json of a BPE model whose pieces another kind of file holds, such as a GGUF file.

    Args:
        pieces: The vocabulary; the place is the id.
        prefixed: Whether a space goes before every text.
    """
    return _description(pieces, BPE, _spaces(prefixed), prefixed)


def _description(pieces: list[Piece], kind: int, normalizers: list[dict[str, Any]], prefixed: bool) -> dict[str, Any]:
    byte_fallback = any(piece.kind == BYTE for piece in pieces)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, piece) for number, piece in enumerate(pieces) if _is_added(piece)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(prefixed),
        "model": _bpe(pieces, byte_fallback) if kind == BPE else _unigram(pieces, byte_fallback),
    }


def _piece(content: bytes) -> Piece:
    fields = _last(content)
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    text, kind = fields[1].decode(), fields.get(3, NORMAL)
    # The library looks for added tokens before it replaces the spaces of a text.
    return Piece(text.replace(SPACE, " ") if kind == USER_DEFINED else text, score, kind)


def _is_added(piece: Piece) -> bool:
    return piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)


def added_token(number: int, piece: Piece) -> dict[str, Any]:
    """Return the entry of a piece that is found whole in a text, or never if it is a control token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece.text, **flags, "special": piece.kind != USER_DEFINED}


def _bpe(pieces: list[Piece], byte_fallback: bool) -> dict[str, Any]:
    joined = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    merges = [
        (piece, cut)
        for piece in pieces
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in joined and piece.text[cut:] in joined
    ]
    # The higher score first, then the longer left part, then the longer right one.
    merges.sort(key=lambda merge: (-merge[0].score, -merge[1], merge[1] - len(merge[0].text)))
    return {
        "type": "BPE",
        "unk_token": next((piece.text for piece in pieces if piece.kind == UNKNOWN), None),
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": {piece.text: number for number, piece in enumerate(pieces)},
        "merges": [[piece.text[:cut], piece.text[cut:]] for piece, cut in merges],
    }


def _unigram(pieces: list[Piece], byte_fallback: bool) -> dict[str, Any]:
    vocabulary = [[piece.text, piece.score] for piece in pieces]
    put_out_of_reach(vocabulary, {number for number, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL)})
    unknown = next(number for number, piece in enumerate(pieces) if piece.kind == UNKNOWN)
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": byte_fallback}


def put_out_of_reach(vocabulary: list[list[Any]], numbers: set[int]) -> None:
    """Give some pieces of a unigram vocabulary, in place, scores so low that no text is cut into them.

    This works if the vocabulary has their single characters as well, or an unknown piece for those it lacks.

    Args:
        vocabulary: Pairs of piece and score; the place is the id.
        numbers: Ids of the pieces.
    """
    lowest = min((score for number, (_, score) in enumerate(vocabulary) if number not in numbers), default=0.0)
    for number in numbers:  # lower than a row of unknown characters
        vocabulary[number][1] = (lowest - UNKNOWN_PENALTY) * (len(vocabulary[number][0]) + 1)


def _normalizers(fields: dict[int, Any], charsmap: bytes) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if fields.get(4, 1):  # remove_extra_whitespaces
        replacements = ((r"\A +|[ ▁]+\z", ""), (" {2,}", " "))
        steps += [{"type": "Replace", "pattern": {"Regex": found}, "content": put} for found, put in replacements]
    return steps + _spaces(bool(fields.get(3, 1)))  # add_dummy_prefix


def _spaces(prefixed: bool) -> list[dict[str, Any]]:
    """Return the steps that write spaces as SentencePiece does."""
    prefix: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    return [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _decoder(prefixed: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _signed(number: int) -> int:
    """Decode a protobuf int32, whose negative numbers are written as 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _parts(message: bytes) -> dict[int, list[Any]]:
    """Return all values of each field of a protobuf message."""
    found: dict[int, list[Any]] = {}
    for number, value in _fields(message):
        found.setdefault(number, []).append(value)
    return found


def _last(message: bytes) -> dict[int, Any]:
    """Return the last value of each field, which is the valid one."""
    return dict(_fields(message))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each field: an integer, or the bytes of anything else.

    Raises:
        ValueError: the message is not protobuf, or is cut off.
    """
    view, place = memoryview(message), 0
    while place < len(view):
        tag, place = _varint(view, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(view, place)
        else:
            if kind == 2:
                size, place = _varint(view, place)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            if place + size > len(view):
                raise ValueError("cut off")
            value, place = bytes(view[place : place + size]), place + size
        yield tag >> 3, value


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    """Return a number that is stored as 7 bits a byte, the lowest first, and the place behind it."""
    number = shift = 0
    while True:
        if place >= len(view) or shift > 63:
            raise ValueError("no number")
        byte, place = view[place], place + 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7
