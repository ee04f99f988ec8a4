"""Tables of plain text, for a terminal and for a log file alike."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of cells under a header, each column as wide as its longest cell.

    Args:
        header: the columns' names; without any, the table has no line for them.
        rows: cells, as many as there are columns.
        left: numbers of the columns that are aligned to the left; all others are aligned to the right.
    """
    lines = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
