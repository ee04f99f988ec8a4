"""Reads text: WikiText's lines, or files, shards and tables of other text, and divides it into documents.

Text is not changed unless you ask for it. That includes WikiText's own tokenisation (` @-@ `) and its `<unk>`: here
`<unk>` is five characters of text and never the tokenizer's unknown token, so that a model learns what it was shown.
"""

from __future__ import annotations

import functools
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
JOINS = re.compile(rf"{_BEFORE}({_SPECIAL})(?=\w)")
# Inside a record, it stands alone on a line, or touches the text before or after it.
INSIDE = re.compile(rf"(?:^[ \t]*|{_BEFORE})({_SPECIAL})(?:\w|[ \t\r]*$)", re.MULTILINE)
# In a file that has such a marker, the texts beside it may also end and begin with a quotation.
_ENDED = rf"""(?:^[ \t]*|(?<={_BEFORE})|(?<=[^\s(\[{{<=:,]["']))"""
_BEGINS = r"(?=[^\w\s]*\w|[ \t\r]*$)"
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
    are_found: bool  # the separators were found in the files, not given
    apart: set[Path]  # files whose records are never joined, because the first separator is inside a record
    titled: bool = False  # its records are lines of articles, because one of them is a title


class _Mark(NamedTuple):
    """A marker that separates documents."""

    marker: str
    inside: bool  # in a record that it parts for itself: a JSON object, or a row of several lines


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
    source = TextSource(field, name, files, documents, dict.fromkeys(files, given), given is None, set())
    if separator == "auto" and not hub:
        _find_separators(source, reading)
    return source._replace(titled=_has_titles(source)) if documents == "articles" else source


def _find_separators(source: TextSource, reading: Reading) -> None:
    """Find the first of MARKERS that separates the documents of each file, and note what it does.

    A marker that occurs once would join all lines before it and all behind it. With auto, it is text.
    """
    joining: list[Path] = []  # files with a marker that joins the lines around it; the first twice if it has two
    for path in source.files:
        marks = _marks(source, path)
        if (first := next(marks, None)) is None:
            continue
        source.separators[path] = first.marker
        if first.inside:
            source.apart.add(path)
        else:
            joining.append(path)
            if len(joining) == 1 and any(mark.marker == first.marker for mark in marks):
                joining.append(path)
    if len(joining) == 1 and source.documents == "auto":
        found, source.separators[joining[0]] = source.separators[joining[0]], None
        reading.note(f"{found} occurs once and is read as text; with --documents records it separates documents")
    what = "is not taken as a document" if source.documents in ("paragraphs", "articles") else "separates documents"
    for found in filter(None, source.separators.values()):
        reading.note(f"{found} {what}")


def _marks(source: TextSource, path: Path) -> Iterator[_Mark]:
    """Yield the markers that separate the documents of a file, in order."""
    if path.suffix in TEXT_SUFFIXES:
        yield from (_Mark(marker, inside=False) for marker in _markers_of_file(path))
        return
    for text in _records(source, path, Reading("", skip=True)):
        inside = path.suffix in JSON_SUFFIXES or "\n" in text.strip()
        yield from (_Mark(marker, inside) for marker in _markers_of_record(text))


def _markers_of_file(path: Path) -> Iterator[str]:
    tail, is_long = b"", False
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            is_long = b"\n" not in block and (is_long or len(tail) > BLOCK_BYTES)
            if is_long:  # no marker begins a line here, but one may be inside it or at its end
                text, end = (tail + block).decode(errors="surrogateescape"), 0
                for found in JOINS.finditer(text):
                    end = found.end()
                    yield found[1]
                tail = b"." + text[end:].encode(errors="surrogateescape")[-1024:]
            else:
                lines, newline, tail = (tail + block).rpartition(b"\n")
                yield from _markers_of_lines(lines + newline)
    yield from _markers_of_lines(tail)


def _markers_of_lines(lines: bytes) -> Iterator[str]:
    if any(marker.encode() in lines for marker in MARKERS):
        for line in lines.split(b"\n"):
            yield from _markers_in(line.decode("utf-8-sig", errors="replace"))


def _markers_in(text: str) -> Iterator[str]:
    """Yield the marker that a text is, and those that begin, end or join it and can't be in a text by chance."""
    text = text.strip()
    for marker in MARKERS:
        if text == marker:
            yield marker
        elif _is_special(marker):
            yield from [marker] * (text.startswith(marker) + text.endswith(marker))
    yield from (found[1] for found in JOINS.finditer(text))


def _markers_of_record(text: str) -> Iterator[str]:
    """Yield the markers of a record. Only a special one may be on a line inside it: HTML has lines such as </s>."""
    around = list(_markers_in(text))
    yield from around
    if not around and any(marker in text for marker in SPECIAL):
        yield from (found[1] for found in INSIDE.finditer(text))


def _has_titles(source: TextSource) -> bool:
    """Return whether a record is nothing but a title. Then records are lines, and articles consist of several."""
    paths = (path for path in source.files if path.suffix not in TEXT_SUFFIXES)
    texts = itertools.chain.from_iterable(_records(source, path, Reading("", skip=True)) for path in paths)
    return any(_is_title(text.strip()) for text in texts)


def _is_special(separator: str) -> bool:
    """Return whether a separator separates anywhere in a line, because no text contains it by chance."""
    return separator.startswith("<|") and separator.endswith("|>")


def text_documents(source: TextSource, reading: Reading) -> Iterator[str]:
    """Yield the documents of a text source, stripped of surrounding space.

    A paragraph is a line that is neither blank nor a heading. An article reaches from one `= Title =` to the next, with
    its headings; a text without titles or separators is one article, and so is each record if no record is a title. A
    record is a row, a JSON object, the text between two separators, or else a whole file. With auto, a document is a
    record for JSON, tables and text with separators, and a paragraph for any other text. A table's row of a single line
    is treated as a line of a text.

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

    These are records of several lines, and those that `_stay_apart`. Other records of one line are lines of a text.
    """
    is_text, separator, all_end = path.suffix in TEXT_SUFFIXES, source.separators[path], _stay_apart(source, path)
    for record in (_lines if is_text else _records)(source, path, reading):
        text = record.removesuffix("\n")
        if source.are_found and not is_text:
            parts = _parted_record(text, separator, reading)
        else:
            parts = _parted(text, separator)
        ends = all_end or "\n" in text
        if ends:
            yield END
        for number, part in enumerate(parts):
            if number:
                if separator != BLANK_LINE:
                    reading.left_out["separators"] += 1
                yield END
            yield from part.split("\n")
        if ends:
            yield END


def _stay_apart(source: TextSource, path: Path) -> bool:
    """Return whether each record of a file ends a document, also one of a single line."""
    if path.suffix in TEXT_SUFFIXES or source.titled:
        return False
    return path.suffix in JSON_SUFFIXES or path in source.apart or source.separators[path] is None


def _parted(text: str, separator: str | None) -> list[str]:
    """Return the parts of a text between separators that were given, or that a text file has; the text if it has none.

    A special one separates wherever it is, any other and a blank line as a line of its own.
    """
    if separator is None:
        return [text]
    if _is_special(separator):
        return text.split(separator)
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip() == ("" if separator == BLANK_LINE else separator):
            parts.append([])
        else:
            parts[-1].append(line)
    return ["\n".join(lines) for lines in parts]


def _parted_record(text: str, separator: str | None, reading: Reading) -> list[str]:
    """Return the parts of a record at the markers that look like separators. One inside a sentence is text."""
    if separator is None or separator not in text:
        return [text]
    parts = _places(separator).split(text)
    if _is_special(separator) and any(separator in part for part in parts):
        reading.note(f"{separator} inside a sentence is text; with --separator '{separator}' it separates there too")
    return parts


@functools.cache
def _places(marker: str) -> re.Pattern[str]:
    """Return where a marker that was found separates records: as one of its own; a special one also inside them."""
    sign = re.escape(marker)
    inside = rf"|\A\s*{sign}|{sign}\s*\Z|{_ENDED}{sign}{_BEGINS}" if _is_special(marker) else ""
    return re.compile(rf"\A\s*{sign}\s*\Z{inside}", re.MULTILINE)


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
        if line is END or _is_title(stripped):
            if paragraphs:
                yield "\n".join(article)
            article, paragraphs = [], 0
        if stripped:
            article.append(stripped)
            paragraphs += not is_heading(stripped)


def is_heading(line: str) -> bool:
    """Return whether a stripped line is one of WikiText's headings: `= Title =`, `= = Section = =`."""
    return line.startswith("= ") and line.endswith(" =") and len(line) > 3


def _is_title(line: str) -> bool:
    """Return whether a stripped text is the title of an article and nothing else."""
    return is_heading(line) and not line.startswith("= =") and "\n" not in line


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
