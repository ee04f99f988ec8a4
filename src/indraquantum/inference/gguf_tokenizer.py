"""What a GGUF file says about the tokenizer, so that llama.cpp gives the ids of training.

llama.cpp has its own tokenizers. Two of them do what a byte-pair encoding of the tokenizers library does: `llama`, for
those made from SentencePiece models, which merges by the score of the result, and `gpt2`, for byte-level ones, which
merges by rank and splits a text first by a pattern that it knows by name. Others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from indraquantum.data.gguf_tokenizer import CUTS, DIGIT_PATTERN, GPT2_PATTERN
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError

ALLOWED = "must have a tokenizer that llama.cpp knows"
SPACE = "\u2581"  # SentencePiece's sign for a space


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GgufTokenizer:
    """The fields `tokenizer.ggml.*`."""

    model: str  # llama or gpt2
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None  # of llama
    merges: list[str] | None  # of gpt2
    add_space_prefix: bool
    unknown_id: int | None


def gguf_tokenizer(tokenizer: TextTokenizer, size: int) -> GgufTokenizer:
    """Return the fields for a vocabulary of `size` tokens.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    description = json.loads(tokenizer.to_json())
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError("--as", "gguf", f"{ALLOWED}: byte-pair encoding, not {model['type']}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens, types = _tokens(tokenizer, description, size)
    unknown = tokenizer.backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    if model.get("byte_fallback"):
        return GgufTokenizer(
            "llama", "default", tokens, types, _scores(tokens, merges), None, _prefix(description), unknown
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError("--as", "gguf", f"{ALLOWED}: without marks inside or at the end of words")
    pairs = [" ".join(merge) for merge in merges]
    return GgufTokenizer("gpt2", _pattern(description), tokens, types, None, pairs, False, unknown)


def _tokens(tokenizer: TextTokenizer, description: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Return the spelling and the kind of each token; ids without one get a name of their own."""
    spelled = {number: token for token, number in description["model"]["vocab"].items()}
    kinds = dict.fromkeys(spelled, TokenType.NORMAL)
    if description["model"].get("byte_fallback"):
        kinds |= {number: TokenType.BYTE for number, token in spelled.items() if _is_byte(token)}
    for added in description["added_tokens"]:
        spelled[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = description["model"].get("unk_token")
    for number, token in spelled.items():
        if token == unknown:  # as a special kind, llama.cpp would read `<unk>` in a text as this token
            kinds[number] = TokenType.NORMAL
    kinds |= dict.fromkeys(tokenizer.control_ids, TokenType.CONTROL)
    names = [spelled.get(number, f"[PAD{number}]") for number in range(size)]
    return names, [kinds.get(number, TokenType.UNUSED) for number in range(size)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return a score for each token, so that merges by score, leftmost first, have the order of `merges`.

    Merges of one token follow each other where the tokenizer was made from a SentencePiece model. Runs of spaces are an
    exception: all have the same score there, and the tokenizers library has mixed their merges.

    Raises:
        UserError: the order is by pairs, which no scores give.
    """
    listed, vocabulary = set(merges), set(tokens)
    for token in tokens:  # llama.cpp merges any two tokens that give a third
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if vocabulary.issuperset(pair) and pair not in listed:
                raise UserError("--as", "gguf", f"{ALLOWED}: all pairs that give {token!r} among its merges")
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
        last["".join(merge)] = rank
    score_of: dict[str, float] = {}
    end, score, group = -1, 0, ""
    for token, rank in first.items():  # in the order of their first merges
        if rank > end:
            score, group = rank, token
        elif set(token) != set(group) or len(set(token)) > 1:
            raise UserError(
                "--as", "gguf", f"{ALLOWED}: merges of one token that follow each other, as in SentencePiece"
            )
        end, score_of[token] = max(end, last[token]), -float(score)
    return [score_of.get(token, 0.0) for token in tokens]


def _prefix(description: dict[str, Any]) -> bool:
    """Return whether a text begins with a space that it did not have.

    Raises:
        UserError: the text is prepared in another way than SentencePiece does.
    """
    steps = [step for step in _steps(description["normalizer"], "normalizers")]
    prepended = {"type": "Prepend", "prepend": SPACE} in steps
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    others = [step for step in steps if step not in (replaced, {"type": "Prepend", "prepend": SPACE})]
    splits = list(_steps(description["pre_tokenizer"], "pretokenizers"))
    for split in splits:
        if split["type"] != "Metaspace" or split.get("split") or split.get("replacement") != SPACE:
            others.append(split)
        prepended |= split.get("prepend_scheme") in ("first", "always")
    if others or not (splits or replaced in steps):
        raise UserError("--as", "gguf", f"{ALLOWED}: spaces written as {SPACE}, and nothing else changed")
    return prepended


def _pattern(description: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer cuts a text.

    Raises:
        UserError: it has none.
    """
    patterns: list[str] = []
    byte_level = False
    for step in _steps(description["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                patterns.append(regex)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(DIGIT_PATTERN)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
            case _:
                patterns.append(step["type"])  # which no name has
    changes = [step["type"] for step in _steps(description["normalizer"], "normalizers")]
    for name, cut in CUTS.items():
        whole_words = description["model"].get("ignore_merges", False)
        same = cut.patterns == tuple(patterns) and cut.whole_words == whole_words
        if byte_level and same and changes in ([], ["NFC"] if cut.composes else []):
            return name
    raise UserError("--as", "gguf", f"{ALLOWED}: byte-level, cut as one of {', '.join(CUTS)}")


def _steps(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of tokenizer.json, which may be a sequence of them under `name`."""
    if part is not None and part["type"] == "Sequence":
        for step in part[name]:
            yield from _steps(step, name)
    elif part is not None:
        yield part
