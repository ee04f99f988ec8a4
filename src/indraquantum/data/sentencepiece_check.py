"""Warns if a tokenizer gives other ids than the SentencePiece model beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from indraquantum.errors import UserError
from indraquantum.progress import warn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Texts about which tokenizers, and conversions of them, disagree.
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


def warn_of_difference(field: str, file: Path, model: Path, tokenizer: Tokenizer) -> None:
    """Compare a tokenizer with the SentencePiece model that belongs to it, and warn on stderr where they differ.

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
        warn(f"note: {model} was not compared with the tokenizer; that needs `pip install sentencepiece`")
        return
    try:
        reference = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):
        if model == file:
            raise UserError(field, file, "must be a SentencePiece model; sentencepiece can't read it") from None
        # Other libraries use the same name for their files.
        warn(f"note: {model} was not compared with {file.name}: it is not a SentencePiece model")
        return
    for text in (*FIXED_TEXTS, *_user_defined(tokenizer)):
        theirs, ours = reference.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            warn(
                f"warning: {file} and SentencePiece's {model.name} differ: {text!r} becomes {_short(ours)} and "
                f"{_short(theirs)}; use the same one to train a model and to use it"
            )
            return


def _user_defined(tokenizer: Tokenizer) -> list[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return [f"with {token.content} in the middle" for token in added if not token.special]


def _short(ids: list[int]) -> str:
    return f"{ids[:8]}"[:-1] + (", ...]" if len(ids) > 8 else "]")
