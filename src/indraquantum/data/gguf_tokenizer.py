"""Converts the tokenizer in a GGUF file to a tokenizer.json that gives the ids of the model's own tokenizer.

The conversion is our own, because that of transformers 5.23 cuts texts wrongly for many values of
`tokenizer.ggml.pre`, which names the way a text is cut into words before they are encoded. It knows nothing of smollm,
whose digits stand alone, and takes GPT-2's way instead. Here an unknown value is refused.

Two kinds of tokenizer occur: byte-level BPE with merges (llama.cpp calls it gpt2), and SentencePiece BPE, whose merges
follow from the pieces' scores (llama).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from indraquantum.data.control_tokens import Stated
from indraquantum.data.gguf_file import GgufFile
from indraquantum.data.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    added_token,
    bpe_description,
)
from indraquantum.errors import UserError

KEY = "tokenizer.ggml."
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
# The published patterns of these tokenizers.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DIGIT_PATTERN = r"\p{N}"


class _Cut(NamedTuple):
    """How a byte-level tokenizer cuts a text before it is encoded."""

    patterns: tuple[str, ...]  # each one cuts the pieces of the one before
    whole_words: bool = False  # a word that is a token is not merged from its parts
    begins: bool = False  # a text begins with BOS if the file does not say
    composes: bool = False  # a text is put into Unicode's form NFC first


_LIKE_GPT2 = _Cut((GPT2_PATTERN,))
_DIGITS_APART = _Cut((DIGIT_PATTERN, GPT2_PATTERN))
_LIKE_LLAMA3 = _Cut((_LLAMA3,), whole_words=True, begins=True)
_LIKE_QWEN2 = _Cut((_QWEN2,), composes=True)
# llama.cpp's own way for files that don't say: no model was trained with it.
_DEFAULT = _Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"))
CUTS = {
    "default": _DEFAULT,
    "gpt-2": _LIKE_GPT2,
    "phi-2": _LIKE_GPT2,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "llama-bpe": _LIKE_LLAMA3,
    "llama3": _LIKE_LLAMA3,
    "llama-v3": _LIKE_LLAMA3,
    "qwen2": _LIKE_QWEN2,
    "deepseek-r1-qwen": _LIKE_QWEN2,
}


class Described(NamedTuple):
    """A tokenizer and its control tokens."""

    content: Any  # of a tokenizer.json
    stated: Stated


def convert(field: str, file: GgufFile) -> Described:
    """Convert the tokenizer of a GGUF file.

    Args:
        field: The option to name in an error.
        file: The file's metadata.

    Raises:
        UserError: it has no tokenizer, one of another kind, or one that is damaged.
    """
    kind = file.metadata.get(f"{KEY}model")
    if kind in (None, "none", "no_vocab") or not file.metadata.get(f"{KEY}tokens"):
        raise UserError(field, file.path, "has no tokenizer; give the model's own folder instead")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        allowed = f"has a tokenizer of the kind {kind}; supported are {BYTE_LEVEL} and {SENTENCEPIECE}"
        raise UserError(field, file.path, allowed)
    pieces = _pieces(field, file)
    if kind == SENTENCEPIECE:
        prefixed = file.metadata.get(f"{KEY}add_space_prefix", True)
        return Described(bpe_description(pieces, bool(prefixed)), _stated(field, file, pieces, begins=True))
    cut = _cut(field, file)
    return Described(_byte_level(field, file, pieces, cut), _stated(field, file, pieces, cut.begins))


def _cut(field: str, file: GgufFile) -> _Cut:
    name = file.metadata.get(f"{KEY}pre", "default")
    if name not in CUTS:
        known = ", ".join(CUTS)
        allowed = f"cuts texts in a way that is not supported ({KEY}pre {name}); supported are {known}"
        raise UserError(field, file.path, allowed)
    return CUTS[name]


def _pieces(field: str, file: GgufFile) -> list[Piece]:
    """Return the vocabulary, without the tokens at its end that only fill it up to the rows of the model's table."""
    tokens = file.metadata[f"{KEY}tokens"]
    kinds = file.metadata.get(f"{KEY}token_type", [NORMAL] * len(tokens))
    scores = file.metadata.get(f"{KEY}scores", [0.0] * len(tokens))
    for name, entries in (("token_type", kinds), ("scores", scores)):
        if not isinstance(entries, list) or len(entries) != len(tokens):
            raise UserError(field, file.path, f"must have as many {KEY}{name} as tokens ({len(tokens)})")
    if len(set(tokens)) != len(tokens):
        raise UserError(field, file.path, "must have each token once, but its tokenizer names one twice")
    pieces = [Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)]
    unknown = file.metadata.get(f"{KEY}unknown_token_id")
    if file.metadata[f"{KEY}model"] == SENTENCEPIECE and isinstance(unknown, int) and unknown < len(pieces):
        pieces[unknown] = pieces[unknown]._replace(kind=UNKNOWN)  # some files call it a control token
    while pieces[-1].text == f"[PAD{len(pieces) - 1}]" and pieces[-1].kind in (UNUSED, USER_DEFINED):
        pieces.pop()
    return pieces


def _stated(field: str, file: GgufFile, pieces: list[Piece], begins: bool) -> Stated:
    """Return BOS and EOS. `begins` says whether texts begin with BOS if the file does not say."""
    found = {}
    for name in ("bos", "eos"):
        number = file.metadata.get(f"{KEY}{name}_token_id")
        if number is not None and not 0 <= number < len(pieces):
            raise UserError(field, file.path, f"must have a token for its {KEY}{name}_token_id {number}")
        found[name] = None if number is None else pieces[number].text
    if found["eos"] is None:
        raise UserError(field, file.path, f"must name the token that ends a document ({KEY}eos_token_id)")
    return Stated(found["bos"], found["eos"], no_bos=not file.metadata.get(f"{KEY}add_bos_token", begins))


def _byte_level(field: str, file: GgufFile, pieces: list[Piece], cut: _Cut) -> dict[str, Any]:
    merges = file.metadata.get(f"{KEY}merges")
    if not isinstance(merges, list):
        raise UserError(field, file.path, f"must have {KEY}merges for its tokenizer, but has none")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in cut.patterns
    ]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        added_token(number, piece)
        for number, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if cut.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, as_bytes]},
        "post_processor": None,
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "byte_fallback": False,
            "fuse_unk": False,
            "ignore_merges": cut.whole_words,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)},
            # A part may be a space; the space between two parts is not at the beginning.
            "merges": [[merge[: (at := merge.find(" ", 1))], merge[at + 1 :]] for merge in merges],
        },
    }
