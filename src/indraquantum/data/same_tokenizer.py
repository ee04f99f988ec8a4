"""Decides whether two tokenizers are the same, for datasets, checkpoints and teachers alike.

They are the same if equal ids mean equal tokens and if every text becomes the same ids. Their files may still differ:
transformers rewrites the post-processor, the flags of added tokens and the format of the merges when it saves one.
"""

from __future__ import annotations

import json

from indraquantum.data.sentencepiece_check import FIXED_TEXTS
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.progress import warn


def require_same_tokenizer(field: str, value: object, must: str, ours: TextTokenizer, theirs: TextTokenizer) -> None:
    """Refuse a tokenizer that is not the same as another one.

    When transformers 5.23 loads a Llama tokenizer again, it drops a space at the beginning of a text. A difference in
    texts that begin with a space is therefore only a warning on stderr.

    Args:
        field: The option to name in an error.
        value: What was given.
        must: What it must have, such as "must have the dataset's tokenizer".
        ours: The tokenizer that it must have.
        theirs: The tokenizer that it has.

    Raises:
        UserError: the two differ; the message says where.
    """
    if (difference := _difference(ours, theirs)) is not None:
        hashes = f"sha256 {ours.sha256}, not sha256 {theirs.sha256}"
        raise UserError(field, value, f"{must}: {difference} ({hashes})")
    for text in FIXED_TEXTS:
        if ours.encode_text(text) != theirs.encode_text(text):
            warn(
                f"warning: {field} {value}: its tokenizer encodes texts that begin with a space differently, such as "
                f"{text!r}; otherwise it is the same"
            )
            return


def require_same_control_tokens(
    field: str, value: object, whose: str, ours: TextTokenizer, theirs: TextTokenizer
) -> None:
    """Refuse data whose documents begin or end with other tokens than those that a model was trained on.

    Args:
        field: The option to name in an error.
        value: What was given.
        whose: Whose documents they must be like, such as "those of --data".
        ours: The tokenizer that those documents were made with.
        theirs: The tokenizer of the documents of `value`.

    Raises:
        UserError: the documents begin or end with other tokens; the message names them.
    """
    if ours.control_ids != theirs.control_ids:
        wanted, found = (f"begin with {each.beginning} and end with {each.ending}" for each in (ours, theirs))
        allowed = (
            f"must have documents that {wanted}, as {whose} do; its documents {found} (see "
            "--document-start of indra prepare)"
        )
        raise UserError(field, value, allowed)


def _difference(ours: TextTokenizer, theirs: TextTokenizer) -> str | None:
    """Return in words where two tokenizers differ; None if they are the same."""
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
    for part, what in (("type", "kinds of model"), ("merges", "merges")):
        if one["model"].get(part) != other["model"].get(part):
            return f"the tokens are equal, but the {what} differ"
    added = [token["content"] for page in (one, other) for token in page["added_tokens"] if not token["special"]]
    texts = [text for text in FIXED_TEXTS if not text.startswith(" ")] + ([" ".join(added)] if added else [])
    for text in texts:
        if ours.encode_text(text) != theirs.encode_text(text):
            return f"the tokens are equal, but the text {text[:60]!r} becomes other ids"
    return None
