"""Reads text: WikiText's lines, or files, shards and tables of other text, and divides it into documents.

Text is not changed unless you ask for it. That includes WikiText's own tokenisation (` @-@ `) and its `<unk>`: here
`<unk>` is five characters of text and never the tokenizer's unknown token, so that a model learns what it was shown.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from indraquantum.config import WIKITEXT
from indraquantum.data.download import hub_files
from indraquantum.data.records import (
    JSON_SUFFIXES,
    MAX_LINE_BYTES,
    NOTHING,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Reading,
    check_text_column,
    json_records,
    kind_of,
    source_files,
    table_rows,
    text_lines,
    wrong_text,
)
from indraquantum.errors import UserError

if TYPE_CHECKING:
    import pyarrow

WIKITEXT_CONFIGURATION = "wikitext-103-v1"
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES)
REMEDY = "give a .txt, .tokens, .raw, .jsonl, .json, .parquet or .arrow file, or a folder of them"
# The markers that public files put between two documents. A marker alone on a line separates documents.
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "<|eos|>", "<eos>", "</s>", "[EOS]")
SPECIAL = tuple(marker for marker in MARKERS if marker.startswith("<|"))
_SPECIAL = "|".join(map(re.escape, SPECIAL))
# A marker that joins two texts touches both of them. In a text about markers there are spaces or quotes beside it.
_BEFORE = r"""[^\s"'`(\[{<]"""
JOINS = re.compile(rf"{_BEFORE}({_SPECIAL})\w")
# Inside a record, it stands alone on a line, or touches the text before or after it.
INSIDE = re.compile(rf"(?:^[ \t]*|{_BEFORE})({_SPECIAL})(?:\w|[ \t\r]*$)", re.MULTILINE)
BLANK_LINE = "blank-line"
BLOCK_BYTES = 1 << 16  # searched at once
END = None  # in a stream of lines: a document ends here


class TextSource(NamedTuple):
    """A text source with its files, and how they are divided into documents."""

    field: str  # the option to name in an error
    name: str
    files: list[Path]
    documents: str  # auto, paragraphs, articles or records
    separators: dict[Path, str | None]  # of each file: what stands between two documents; BLANK_LINE for a blank line
    apart: set[Path]  # those whose rows are never joined, because the first separator is inside a row


def read_wikitext(field: str, name: str, *, reading: Reading | None = None, **options: str) -> list[str]:
    """Return all documents of a text source; `options` are those of `open_text`."""
    reading = reading or Reading(field)
    return list(text_documents(open_text(field, name, reading, **options), reading))


def open_text(
    field: str, name: str, reading: Reading, *, documents: str = "auto", separator: str = "auto"
) -> TextSource:
    """Find the files of a text source and what separates its documents.

    Args:
        field: The option to name in an error.
        name: A .tokens, .raw or .txt file; a .json or .jsonl file or a table (.parquet, .arrow) with `text`; a folder
            or a glob of them; a folder that datasets' `save_to_disk` wrote; or the hub id of a dataset with the
            configuration wikitext-103-v1, as `owner/name` or `owner/name/CONFIGURATION`, with or without `@REVISION`.
        reading: Collects notes on how the source is read.
        documents: auto, paragraphs, articles or records.
        separator: auto finds a marker such as <|endoftext|>; none has no separator; blank-line; or the separator.

    Raises:
        UserError: the source is missing or of an unknown kind, or the hub can't be reached.
    """
    remedy = f"{REMEDY} with {field} PATH"
    hub = (
        not Path(name).exists()
        and not name.endswith(SUFFIXES)
        and name.partition("@")[0].count("/") in (1, 2)
        and name[0] not in "./~"
        and not set("*?[") & set(name)
    )
    files = _hub_files(field, name, remedy) if hub else source_files(field, name, SUFFIXES, remedy, reading)
    given = None if separator in ("auto", "none") else separator
    source = TextSource(field, name, files, documents, dict.fromkeys(files, given), set())
    if separator == "auto" and not hub:
        for path in files:
            source.separators[path] = _marker(source, path)
        what = "is not taken as a document" if documents in ("paragraphs", "articles") else "separates documents"
        for found in filter(None, source.separators.values()):
            reading.note(f"{found} {what}")
    return source


def _marker(source: TextSource, path: Path) -> str | None:
    """The first of MARKERS that separates the documents of a file, or None. If it is inside a row, `apart` has it."""
    if path.suffix in TEXT_SUFFIXES:
        return _marker_of_file(path)
    for text in _records(source, path, Reading("", skip=True)):
        if found := _marker_of_record(text):
            if "\n" in text.strip():
                source.apart.add(path)
            return found
    return None


def _marker_of_file(path: Path) -> str | None:
    tail, is_long = b"", False
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            is_long = b"\n" not in block and (is_long or len(tail) > BLOCK_BYTES)
            if is_long:  # no marker begins a line here, but one may be inside it or at its end
                if b"<|" in tail + block and (found := JOINS.search((tail + block).decode(errors="replace"))):
                    return found[1]
                tail = b"." + block[-1024:]
                continue
            lines, newline, tail = (tail + block).rpartition(b"\n")
            if found := _marker_of_lines(lines + newline):
                return found
    return _marker_of_lines(tail)


def _marker_of_lines(lines: bytes) -> str | None:
    if not any(marker.encode() in lines for marker in MARKERS):
        return None
    texts = (line.decode("utf-8-sig", errors="replace") for line in lines.split(b"\n"))
    return next(filter(None, map(_marker_in, texts)), None)


def _marker_in(text: str) -> str | None:
    """Return the marker that a text is, or that begins, ends or joins it and can't be in a text by chance."""
    text = text.strip()
    for marker in MARKERS:
        if text == marker or (_is_special(marker) and (text.startswith(marker) or text.endswith(marker))):
            return marker
    found = JOINS.search(text)
    return found[1] if found else None


def _marker_of_record(text: str) -> str | None:
    """Return the marker of a record. Only a special one may be on a line inside it: HTML has lines such as </s>."""
    if found := _marker_in(text):
        return found
    inside = INSIDE.search(text) if any(marker in text for marker in SPECIAL) else None
    return inside[1] if inside else None


def _is_special(separator: str) -> bool:
    """Return whether a separator separates anywhere in a line, because no text contains it by chance."""
    return separator.startswith("<|") and separator.endswith("|>")


def text_documents(source: TextSource, reading: Reading) -> Iterator[str]:
    """Yield the documents of a text source, stripped of surrounding space.

    A paragraph is a line that is neither blank nor a heading. An article reaches from one `= Title =` to the next, with
    its headings; a text without titles or separators is one article. A record is a row, a JSON object, the text between
    two separators, or else a whole file. With auto, a document is a record for JSON, tables and text with separators,
    and a paragraph for any other text. A table's row of a single line is treated as a line of a text.

    Args:
        source: From `open_text`.
        reading: What to do with wrong records, which are refused by default. It collects what is left out.

    Raises:
        UserError: the source is empty, not UTF-8, or a table that can't be read.
    """
    if source.documents == "articles":
        documents = _articles(itertools.chain.from_iterable(_with_ends(source, p, reading) for p in source.files))
    elif source.documents == "paragraphs":
        lines = itertools.chain.from_iterable(_with_ends(source, path, reading) for path in source.files)
        documents = _paragraphs((line for line in lines if line is not END), reading)
    else:
        documents = itertools.chain.from_iterable(_records_of_file(source, path, reading) for path in source.files)
    first = next(documents, None)
    if first is None:
        raise reading.nothing(source.name, "paragraph that is not a heading")
    yield first
    yield from documents
    separators = set(source.separators.values()) - {None, BLANK_LINE}
    if separators and not reading.left_out["separators"]:
        reading.note(f"the separator {separators.pop()!r} does not occur in it")


def _lines(source: TextSource, path: Path, reading: Reading) -> Iterator[str]:
    return (line for _, line in text_lines(source.field, path, reading))


def _paragraphs(lines: Iterable[str], reading: Reading) -> Iterator[str]:
    for line in filter(None, map(str.strip, lines)):
        if is_heading(line):
            reading.left_out["headings"] += 1
        else:
            yield line


def _records_of_file(source: TextSource, path: Path, reading: Reading) -> Iterator[str]:
    """The documents of a file, where neither paragraphs nor articles are asked for."""
    if source.separators[path] or (path.suffix in TEXT_SUFFIXES and source.documents == "records"):
        yield from _joined(path, _with_ends(source, path, reading), reading)
        return
    if path.suffix in TEXT_SUFFIXES:
        yield from _paragraphs(_lines(source, path, reading), reading)
        return
    of_lines = path.suffix in TABLE_SUFFIXES and source.documents == "auto"
    for text in map(str.strip, _records(source, path, reading)):
        if not text:
            reading.left_out["empty records"] += 1
        elif of_lines and "\n" not in text and is_heading(text):
            reading.left_out["headings"] += 1
        else:
            if of_lines and "\n" in text:
                reading.note("a row of several lines is one document")
            yield text


def _with_ends(source: TextSource, path: Path, reading: Reading) -> Iterator[str | None]:
    """Yield the lines of a file, with END where a document ends: at a separator, and around some records.

    These are records of several lines, JSON objects and the rows of tables in `apart`. Other records of one line are
    lines of a text, and so are all of one line if documents are articles, which a list of lines makes up.
    """
    if path.suffix in TEXT_SUFFIXES:
        records: Iterable[list[str]] = ([line] for line in _lines(source, path, reading))
    else:
        records = (text.removesuffix("\n").split("\n") for text in _records(source, path, reading))
    separator = source.separators[path]
    all_end = (path.suffix in JSON_SUFFIXES or path in source.apart) and source.documents != "articles"
    for lines in records:
        ends = all_end or len(lines) > 1
        if ends:
            yield END
        for line in lines:
            parts = _parted(line, separator)
            yield parts[0]
            for part in parts[1:]:
                if separator != BLANK_LINE:
                    reading.left_out["separators"] += 1
                yield END
                yield part
        if ends:
            yield END


def _parted(line: str, separator: str | None) -> list[str]:
    """Return the parts of a line between separators, or the line if it has none."""
    if separator is None:
        return [line]
    if line.strip() == ("" if separator == BLANK_LINE else separator):
        return ["", ""]
    return line.split(separator) if _is_special(separator) else [line]


def _joined(path: Path, lines: Iterable[str | None], reading: Reading) -> Iterator[str]:
    """Join the lines up to each END to a document. Blank documents are dropped, and too long ones are wrong."""
    document: list[str] = []
    size = 0
    for line in itertools.chain(lines, [END]):
        if line is not END:
            size += len(line) + 1
            if size <= MAX_LINE_BYTES + 1:
                document.append(line.rstrip("\r\n"))
            continue
        if size > MAX_LINE_BYTES + 1:
            beginning = next(filter(str.strip, document), "")[:40]
            reading.add(path, f"a document must be at most {MAX_LINE_BYTES} characters long; see {beginning!r}")
        elif text := "\n".join(document).strip():
            yield text
        document, size = [], 0


def _articles(lines: Iterable[str | None]) -> Iterator[str]:
    """Join lines to articles, which also end at END. Articles without a paragraph are dropped."""
    article: list[str] = []
    paragraphs = 0
    for line in itertools.chain(lines, [END]):
        stripped = "" if line is END else line.strip()
        heading = is_heading(stripped)
        if line is END or (heading and not stripped.startswith("= =")):
            if paragraphs:
                yield "\n".join(article)
            article, paragraphs = [], 0
        if stripped:
            article.append(stripped)
            paragraphs += not heading


def is_heading(line: str) -> bool:
    """Return whether a stripped line is one of WikiText's headings: `= Title =`, `= = Section = =`."""
    return line.startswith("= ") and line.endswith(" =") and len(line) > 3


def _records(source: TextSource, path: Path, reading: Reading) -> Iterator[str]:
    """Yield the texts of a JSON file or a table, unchanged."""
    if path.suffix in TABLE_SUFFIXES:
        yield from _table_texts(source.field, path, reading)
        return
    for number, item in enumerate(json_records(source.field, path, reading), start=1):
        if isinstance(item, str):
            text: object = item
        elif not isinstance(item, dict):
            reading.add(path, f"record {number} must be an object with a text 'text'; {kind_of(item)}")
            continue
        elif "text" not in item:
            names = ", ".join(map(repr, list(item)[:8]))
            reading.add(path, f"record {number} must have a text field 'text'; it has {names or 'nothing'}")
            continue
        else:
            text = "" if item["text"] is None else item["text"]
            reading.unused_fields.update(name for name in item if name != "text" and item[name] not in NOTHING)
        if reason := wrong_text(text):
            reading.add(path, f"record {number} must have a text field 'text'; {reason}")
        else:
            yield text


def _table_texts(field: str, path: Path, reading: Reading) -> Iterator[str]:
    import pyarrow

    others: list[str] = []

    def only_text(schema: pyarrow.Schema) -> list[str]:
        if "text" not in schema.names:
            raise UserError(field, path, f"must have a column 'text'; it has {', '.join(schema.names) or 'none'}")
        check_text_column(field, path, schema, "text")
        named = zip(schema.names, schema.types, strict=True)
        others.extend(name for name, kind in named if name != "text" and not pyarrow.types.is_null(kind))
        return ["text"]

    rows = 0
    for row in table_rows(field, path, only_text):
        rows += 1
        yield row["text"] or ""
    if rows:
        reading.unused_fields.update(dict.fromkeys(others, rows))


def _hub_files(field: str, name: str, remedy: str) -> list[Path]:
    """The training shards of a WikiText repository of the hub."""
    repository, _, revision = name.partition("@")
    owner, short, *configuration = repository.split("/")
    pattern = f"{configuration[0] if configuration else WIKITEXT_CONFIGURATION}/train-*.parquet"
    repository = f"{owner}/{short}{'@' if revision else ''}{revision}"
    folder = hub_files(field, repository, [pattern], "dataset", remedy)
    shards = sorted(folder.glob(pattern))
    if not shards:
        raise UserError(field, name, f"has no {pattern} on the hub (the default is {WIKITEXT}); {remedy}")
    return shards
