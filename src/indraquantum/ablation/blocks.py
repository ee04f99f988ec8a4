"""A report as a list of blocks, written as Markdown with pictures beside it, or as one HTML page with its pictures.

It has five kinds of blocks and two formats, which is less than any template library would need.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #bbb;padding:.2rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#eee;padding:0 .2rem}"
)


@dataclass(frozen=True)
class Heading:
    """A heading of `level` 1 or 2."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command or a hash, as it is typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder."""

    path: Path
    caption: str


Block = Heading | Paragraph | Code | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as a page of Markdown."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def html_page(blocks: Sequence[Block]) -> str:
    """Return the blocks as one HTML page that needs no other file."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(map(_html, blocks))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Code(text):
            fence = "```"
            while fence in text:
                fence += "`"
            return f"{fence}\n{text}\n{fence}"
        case Picture(path, caption):
            return f"![{caption}]({path.name})"
        case Table(header, rows):
            rule = ["---", *["---:"] * (len(header) - 1)]
            cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Picture(path, caption):
            content = base64.b64encode(path.read_bytes()).decode()
            alt = html.escape(caption)
            image = f'<img alt="{alt}" src="data:image/png;base64,{content}">'
            return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"
        case Table(header, rows):
            top = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
