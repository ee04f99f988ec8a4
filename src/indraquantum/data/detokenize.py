"""WikiText's own tokenisation undone: ` @-@ ` joined, no space before punctuation, headings without their signs.

It is not always certain where a space was (an apostrophe may open or close), so what is doubtful stays as it is.
"""

from __future__ import annotations

import re

RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:= )+(.*?)(?: =)+$", r"\1"),  # = = Title = =
        (r" @([-,.])@ ", r"\1"),  # fifty @-@ two, 1 @,@ 000, 2 @.@ 5
        (r'" ([^"]*?) "', r'"\1"'),
        (r"([(\[{£$€]) ", r"\1"),
        (r" (?=[,.;:!?)\]}%])", ""),
        (r" (?='(?:s|t|re|ve|ll|d|m)\b)", ""),  # Ross 's
        (r" (?=n't\b)", ""),
    )
)


def detokenize(line: str) -> str:
    """Return a line of WikiText as it was written before the dataset's makers took it apart.

    Args:
        line: One paragraph or heading; `<unk>` stays, because nobody knows what stood there.
    """
    for pattern, replacement in RULES:
        line = pattern.sub(replacement, line)
    return line
