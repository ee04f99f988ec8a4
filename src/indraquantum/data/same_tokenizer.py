"""Whether two tokenizers are the same: the one comparison, used for datasets, checkpoints and teachers alike.

They are the same where equal ids mean equal tokens and where text becomes the same ids. Files differ for other reasons:
transformers rewrites the post-processor, the flags of added tokens and the format of the merges when it saves one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from indraquantum.errors import UserError

if TYPE_CHECKING:
    from indraquantum.data.tokenizer import TextTokenizer

# What tokenizers, and conversions of them, disagree about.
FIXED_TEXTS = (
    "The quick brown fox doesn't jump; it's asleep.",
    "two  spaces   three    four     five",
    "def f(x):\n    if x:\n        return 10\n\treturn 2\n\n\nend",
    "0 1 23 456 7890 3.14159 1,000,000 2026-11-28",
    "Zwölf Übungen, naïve café, \u212b, 漢字, Привет, 😀",
    "CamelCase snake_case --- === ... (a) [b] {c} <z> @#$%",
    "\n\n# Heading\r\n* item\n",
    "a space at the end ",
    " a space at the beginning",
    "        an indent at the beginning",
)


def require_same_tokenizer(field: str, value: object, must: str, ours: TextTokenizer, theirs: TextTokenizer) -> None:
    """Refuse a tokenizer that is another one.

    transformers 5.23 drops a space at the beginning of a text where it loads a Llama tokenizer anew. So a difference in
    texts that begin with a space is said on stderr, and is no reason to refuse.

    Args:
        field: The option to name in an error.
        value: What was given.
        must: What it must have, such as "must have the dataset's tokenizer".
        ours: The tokenizer that it must have.
        theirs: The one that it has.

    Raises:
        UserError: they differ; the message says where.
    """
    if (difference := _difference(ours, theirs)) is not None:
        hashes = f"sha256 {ours.sha256}, not sha256 {theirs.sha256}"
        raise UserError(field, value, f"{must}: {difference} ({hashes})")
    for text in FIXED_TEXTS:
        if ours.encode_text(text) != theirs.encode_text(text):
            print(
                f"warning: {field} {value}: its tokenizer gives other ids to texts that begin with a space, such as "
                f"{text!r}; otherwise it is the same",
                file=sys.stderr,
            )
            return


def require_same_control_tokens(
    field: str, value: object, whose: str, ours: TextTokenizer, theirs: TextTokenizer
) -> None:
    """Refuse data whose documents begin or end with other tokens than a model was trained on.

    Args:
        field: The option to name in an error.
        value: What was given.
        whose: Whose documents they must be like, such as "those of --data".
        ours: How these documents begin and end.
        theirs: How those of `value` do.

    Raises:
        UserError: they begin or end with other tokens; the message names them.
    """
    if ours.control_ids != theirs.control_ids:
        wanted, found = (f"begin with {each.beginning} and end with {each.ending}" for each in (ours, theirs))
        allowed = f"must have documents that {wanted}, as {whose} do; its own {found} (see --document-start of prepare)"
        raise UserError(field, value, allowed)


def _difference(ours: TextTokenizer, theirs: TextTokenizer) -> str | None:
    """Where two tokenizers differ, in words; None where they are the same."""
    one, other = (json.loads(tokenizer.to_json()) for tokenizer in (ours, theirs))
    if one == other:
        return None
    if ours.vocabulary_size != theirs.vocabulary_size:
        return f"{ours.vocabulary_size:,} tokens, not {theirs.vocabulary_size:,}"
    tokens = [tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (ours, theirs)]
    if tokens[0] != tokens[1]:
        number = min(number for _, number in tokens[0].items() ^ tokens[1].items())
        spelled = [tokenizer.backend.id_to_token(number) for tokenizer in (ours, theirs)]
        return f"token {number} is {spelled[0]!r}, not {spelled[1]!r}"
    for part, what in (("type", "kind"), ("merges", "merges")):
        if one["model"].get(part) != other["model"].get(part):
            return f"equal tokens, but other {what}"
    added = [token["content"] for page in (one, other) for token in page["added_tokens"] if not token["special"]]
    texts = [text for text in FIXED_TEXTS if not text.startswith(" ")] + ([" ".join(added)] if added else [])
    for text in texts:
        if ours.encode_text(text) != theirs.encode_text(text):
            return f"equal tokens, but the text {text[:60]!r} becomes other ids"
    return None


def say_difference(field: str, file: Path, model: Path, tokenizer: TextTokenizer) -> None:
    """Compare a tokenizer with the SentencePiece model beside it or behind it; say on stderr where they differ.

    Args:
        field: The option to name in an error.
        file: The tokenizer.json, or the SentencePiece model if the tokenizer was converted from it.
        model: The SentencePiece model.
        tokenizer: The tokenizer.

    Raises:
        UserError: the tokenizer was converted from a file that sentencepiece can't read.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        print(f"note: {model} was not compared: that needs `pip install sentencepiece`", file=sys.stderr)
        return
    try:
        reference = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        if model == file:
            raise UserError(field, file, "must be a SentencePiece model; sentencepiece can't read it") from None
        # Other libraries name their files so too.
        print(f"note: {model} was not compared with {file.name}: it is no SentencePiece model", file=sys.stderr)
        return
    for text in (*FIXED_TEXTS, *_user_defined(tokenizer)):
        theirs, ours = reference.encode(text), tokenizer.encode_text(text)
        if theirs != ours:
            print(
                f"warning: {file} and SentencePiece's {model.name} differ: {text!r} becomes {_short(ours)} and "
                f"{_short(theirs)}; a model trained with one of them is not used to the other",
                file=sys.stderr,
            )
            return


def _user_defined(tokenizer: TextTokenizer) -> list[str]:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return [f"with {token.content} in the middle" for token in added if not token.special]


def _short(ids: list[int]) -> str:
    return f"{ids[:8]}"[:-1] + (", ...]" if len(ids) > 8 else "]")
