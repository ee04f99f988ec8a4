"""The text of tokens, as they are written one after the other.

A token can't be decoded alone: decoders drop a leading space, and a character may take several tokens. So a token's
share of the text is what it adds to the text of the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from indraquantum.data.tokenizer import TextTokenizer

UNFINISHED = "\ufffd"  # what a decoder shows for the bytes of an incomplete character
WINDOW = 8  # tokens before a new one that are decoded with it


class TextStream:
    """The text of tokens that come one by one, after a prompt.

    Args:
        tokenizer: the tokenizer.
        prompt_ids: the tokens before the first one.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = [int(token) for token in prompt_ids]  # a window of the last tokens
        # Where in the window a decoder may begin without cutting a character, the last one being the end of what was
        # told. Of the prompt only the beginning is known.
        self._starts = [0, len(self._ids)]

    def add(self, token: int) -> str:
        """Return the share of one more token: "" for control tokens, and for all but the last one of a character."""
        self._ids.append(token)
        return self._told(last=False)

    def finish(self) -> str:
        """Return what was held back: the bytes of a character that never became whole."""
        return self._told(last=True)

    def _told(self, last: bool) -> str:
        whole = self._tokenizer.decode(self._ids)
        if whole.endswith(UNFINISHED) and not last:
            return ""
        share = whole[len(self._tokenizer.decode(self._ids[: self._starts[-1]])) :]
        self._starts.append(len(self._ids))
        while len(self._starts) > 2 and self._starts[-1] - self._starts[1] >= WINDOW:
            cut = self._starts[1]
            del self._ids[:cut]
            self._starts = [start - cut for start in self._starts[1:]]
        return share


def token_texts(tokenizer: TextTokenizer, prompt_ids: Sequence[int], written_ids: Sequence[int]) -> list[str]:
    """Return each written token's share of the text. What is incomplete at the end belongs to the last token."""
    stream = TextStream(tokenizer, prompt_ids)
    texts = [stream.add(token) for token in written_ids]
    if texts:
        texts[-1] += stream.finish()
    return texts
