"""Undoes WikiText's own tokenisation: ` @-@ `, spaces before punctuation, and the signs around headings.

It is not always certain where a space was; an apostrophe, for example, may open or close. Doubtful places stay as they
are. The rules are for WikiText alone: a general detokenizer, such as sacremoses, knows neither ` @-@ ` nor headings.
"""

from __future__ import annotations

import re

RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^\s*(?:= )+(.*?)(?: =)+\s*$", r"\1"),  # = = Title = =
        (r" @([-,.])@ ", r"\1"),  # fifty @-@ two, 1 @,@ 000, 2 @.@ 5
        (r'" ([^"]*?) "', r'"\1"'),
        (r"([(\[{£$€]) ", r"\1"),
        (r" (?=[,.;:!?)\]}%])", ""),
        (r" (?='(?:s|t|re|ve|ll|d|m)\b)", ""),  # Ross 's
        (r" (?=n't\b)", ""),
    )
)


def detokenize(line: str) -> str:
    """Return a line of WikiText as ordinary text.

    Args:
        line: One paragraph or heading. `<unk>` stays, because nobody knows which word it replaced.
    """
    for pattern, replacement in RULES:
        line = pattern.sub(replacement, line)
    return line
