"""Reading the two kinds of text: WikiText's lines and Stanford Alpaca's instructions, and any file of the same shape.

WikiText is kept as it is unless told otherwise, its own tokenisation (` @-@ `) and its `<unk>` among it: `<unk>` is
five characters of text here, never the tokenizer's unknown token, because a model that can write it is honest about
what it was shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum.config import WIKITEXT
from indraquantum.data.download import download_url, hub_files
from indraquantum.errors import UserError

WIKITEXT_CONFIGURATION = "wikitext-103-v1"
TEXT_SUFFIXES = (".tokens", ".raw", ".txt")
WIKITEXT_REMEDY = "give a .tokens, .raw, .txt or .parquet file"
ALPACA_REMEDY = "give a .json, .jsonl or .parquet file"
PARQUET_ROWS = 1024  # read at once
MAX_LINE_BYTES = 16 << 20  # a longer line is no paragraph; reading stops there, so that memory stays small


class AlpacaSample(NamedTuple):
    """One instruction with its answer."""

    instruction: str
    input: str  # empty where the instruction needs none
    output: str


class Problems:
    """What to do with a record that is wrong: refuse the source at once, or leave the record out and remember it."""

    def __init__(self, field: str, skip: bool = False) -> None:
        """Begin with none.

        Args:
            field: The option to name in an error.
            skip: Leave wrong records out instead of refusing the source.
        """
        self.field, self.skip = field, skip
        self.skipped: list[dict[str, str]] = []  # file and reason of each record that was left out

    def add(self, path: Path, reason: str) -> None:
        """Raise UserError for a wrong record of the file `path`, or note it where such records are skipped."""
        if not self.skip:
            raise UserError(self.field, path, reason)
        self.skipped.append({"file": str(path), "reason": reason})


def read_wikitext(field: str, name: str, **options: Any) -> list[str]:
    """Return all that `wikitext_documents` yields."""
    return list(wikitext_documents(field, name, **options))


def wikitext_documents(
    field: str, name: str, *, articles: bool = False, problems: Problems | None = None
) -> Iterator[str]:
    """Yield WikiText's paragraphs: the lines that are neither blank nor a heading, stripped of surrounding space.

    Args:
        field: The option to name in an error.
        name: A .tokens, .raw, .txt or .parquet file (column `text`, a line a row), or a hub id with the files of
            configuration wikitext-103-v1: `owner/name`, `owner/name/CONFIGURATION`, either with `@REVISION`.
        articles: Whole articles instead, from one `= Title =` to the next, headings among their lines; a text without
            titles is one article.
        problems: What to do with lines that are wrong; by default they are refused.

    Raises:
        UserError: missing, empty, not UTF-8, not parquet, or the hub can't be reached.
    """
    path = Path(name)
    problems = problems or Problems(field)
    remedy = f"{WIKITEXT_REMEDY} with {field} PATH"
    if path.is_file() and path.suffix in TEXT_SUFFIXES:
        lines: Iterable[str] = (line for _, line in _text_lines(field, path, problems))
    elif path.is_file() and path.suffix == ".parquet":
        lines = (row["text"] or "" for row in _read_parquet(field, path, {"text": True}))
    elif (
        path.exists()
        or path.suffix in (*TEXT_SUFFIXES, ".parquet")
        or name.partition("@")[0].count("/") not in (1, 2)
        or name[0] in "./~"
    ):
        _refuse_file(field, path, remedy)
    else:
        lines = _hub_lines(field, name, remedy)
    stripped = (line for line in map(str.strip, lines) if line)
    documents = _articles(stripped) if articles else (line for line in stripped if not is_heading(line))
    first = next(documents, None)
    if first is None:
        raise UserError(field, name, "must hold at least one paragraph that is no heading")
    yield first
    yield from documents


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Join stripped lines to articles; one without a paragraph is none."""
    article: list[str] = []
    paragraphs = 0
    for line in lines:
        heading = is_heading(line)
        if heading and not line.startswith("= ="):
            if paragraphs:
                yield "\n".join(article)
            article, paragraphs = [], 0
        article.append(line)
        paragraphs += not heading
    if paragraphs:
        yield "\n".join(article)


def is_heading(line: str) -> bool:
    """Whether a stripped line is one of WikiText's headings: `= Title =`, `= = Section = =`."""
    return line.startswith("= ") and line.endswith(" =") and len(line) > 3


def read_alpaca(field: str, name: str, **options: Any) -> list[AlpacaSample]:
    """Return all that `alpaca_samples` yields."""
    return list(alpaca_samples(field, name, **options))


def local_instructions(field: str, name: str) -> str:
    """Return the file of an address, downloaded; a file stays what it is."""
    remote = name.startswith(("http://", "https://"))
    return str(download_url(field, name, f"{ALPACA_REMEDY} with {field} PATH")) if remote else name


def alpaca_samples(field: str, name: str, *, problems: Problems | None = None) -> Iterator[AlpacaSample]:
    """Yield instructions in Stanford Alpaca's form: objects with texts `instruction`, `output` and, maybe, `input`.

    Args:
        field: The option to name in an error.
        name: A .json list, a .jsonl with one object a line, a .parquet with those columns, or a URL of one of them.
        problems: What to do with items that are wrong; by default they are refused. Where they are skipped, so are
            items with an empty output, which are kept otherwise: the published file has some.

    Raises:
        UserError: missing, empty, not UTF-8, of another shape (the first wrong item is named), or no network.
    """
    remedy = f"{ALPACA_REMEDY} with {field} PATH"
    path = Path(local_instructions(field, name))
    problems = problems or Problems(field)
    if not path.is_file() or path.suffix not in (".json", ".jsonl", ".parquet"):
        _refuse_file(field, path, remedy)
    if path.suffix == ".json":
        items: Iterable[Any] = _parse_json(field, path, _read_text(field, path), "")
        if not isinstance(items, list):
            allowed = f"must be a JSON list of instructions, objects with instruction, input and output; {_kind(items)}"
            raise UserError(field, path, allowed)
    elif path.suffix == ".jsonl":
        items = _json_lines(field, path, problems)
    else:
        items = _read_parquet(field, path, {"instruction": True, "input": False, "output": True})
    known: dict[str, int] = {}
    none = True
    for number, item in enumerate(items, start=1):
        reason = _wrong(number, item, known, problems.skip)
        if reason:
            problems.add(path, reason)
        else:
            none = False
            yield AlpacaSample(item["instruction"], item.get("input") or "", item["output"])
    if none:
        raise UserError(field, path, "must hold at least one instruction")


def _json_lines(field: str, path: Path, problems: Problems) -> Iterator[Any]:
    for number, line in _text_lines(field, path, problems):
        if not line.strip():
            continue
        try:
            item = _parse_json(field, path, line, f" (line {number})")
        except UserError as error:
            problems.add(path, error.allowed)
        else:
            yield item


def _wrong(number: int, item: Any, known: dict[str, int], strict: bool) -> str | None:
    """Say what is wrong with an item, or None; `known` collects the ids of those seen, where they have any."""
    if not isinstance(item, dict):
        return f"item {number} must be an object with instruction and output; {_kind(item)}"
    for key in AlpacaSample._fields:
        text = item.get(key)
        if key == "input" and text is None:  # null stands for an empty input, as parquet files have it
            continue
        if not isinstance(text, str):
            return f"item {number} must have a text {key!r}; {_kind(text) if key in item else 'it is missing'}"
        if not text.isascii() and not is_text(text):
            return f"item {number} holds half a surrogate pair, which is no text"
        if len(text) > MAX_LINE_BYTES:
            return f"item {number}: {key!r} must be at most {MAX_LINE_BYTES} characters long; it has {len(text)}"
    if strict and not item["output"].strip():
        return f"item {number} has an empty output"
    if item.get("id") is not None:
        first = known.setdefault(str(item["id"]), number)
        if first != number:
            return f"item {number} has the id of item {first}: {str(item['id'])[:60]!r}"
    return None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return f"it is {names.get(type(value), 'a number')}"


def is_text(text: str) -> bool:
    """Whether `text` is free of half surrogate pairs, which no tokenizer can read.

    JSON can spell them, and Python puts them for bytes of the command line that are no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text_lines(field: str, path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, numbered from 1, with or without a byte order mark."""
    blank, offset, number = True, 0, 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                start, offset = offset, offset + len(line)
                if len(line) > MAX_LINE_BYTES:
                    problems.add(path, f"line {number} must be at most {MAX_LINE_BYTES} bytes long")
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                        offset += len(line)
                    continue
                blank = blank and not line.strip()
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    problems.add(path, f"must be UTF-8 text (byte {start + error.start} is not) in line {number}")
                else:
                    yield number, text
    except OSError as error:
        raise UserError(field, path, f"must be a file that can be read ({error.strerror})") from None
    if blank and not problems.skipped:
        raise UserError(field, path, "must not be empty")


def _refuse_file(field: str, path: Path, remedy: str) -> None:
    """Say why `path` can't be the file that is wanted."""
    if path.is_dir():
        raise UserError(field, path, f"is a folder; {remedy}")
    if path.exists():
        raise UserError(field, path, f"has an unknown ending {path.suffix!r}; {remedy}")
    raise UserError(field, path, f"does not exist; {remedy}")


def _read_text(field: str, path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark, that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(field, path, f"must be a file that can be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(field, path, f"must be UTF-8 text (byte {error.start} is not)") from None
    if not text.strip():
        raise UserError(field, path, "must not be empty")
    return text


def _parse_json(field: str, path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where or f" (line {error.lineno})"
        raise UserError(field, path, f"must be JSON; {error.msg}{place}") from None
    except (RecursionError, ValueError) as error:  # nested a thousand deep; an integer of thousands of digits
        raise UserError(field, path, f"must be JSON of instructions; {type(error).__name__}{where}") from None


def _read_parquet(field: str, path: Path, columns: dict[str, bool]) -> Iterator[dict[str, Any]]:
    """Yield a parquet file's text columns as dicts; `columns` says of each whether it is required."""
    import pyarrow
    import pyarrow.parquet

    def is_string(kind: pyarrow.DataType) -> bool:
        return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            missing = [name for name, required in columns.items() if required and name not in schema.names]
            if missing:
                raise UserError(field, path, f"must have a column {missing[0]!r}; it has {', '.join(schema.names)}")
            there = [name for name in columns if name in schema.names]
            for name in there:
                if schema.names.count(name) > 1:
                    raise UserError(field, path, f"must have one column {name!r}, not {schema.names.count(name)}")
                if not is_string(schema.field(name).type):
                    raise UserError(field, path, f"column {name!r} must be text; it is {schema.field(name).type}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=there):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(field, path, f"must be a parquet file that can be read ({reason})") from None
    except UnicodeDecodeError:
        raise UserError(field, path, "must hold UTF-8 text; a column's bytes are not") from None


def _hub_lines(field: str, name: str, remedy: str) -> Iterable[str]:
    """Read the training lines of a WikiText repository of the hub, shard by shard."""
    repository, _, revision = name.partition("@")
    owner, short, *configuration = repository.split("/")
    pattern = f"{configuration[0] if configuration else WIKITEXT_CONFIGURATION}/train-*.parquet"
    repository = f"{owner}/{short}{'@' if revision else ''}{revision}"
    folder = hub_files(field, repository, [pattern], "dataset", remedy)
    shards = sorted(folder.glob(pattern))
    if not shards:
        raise UserError(field, name, f"has no {pattern} on the hub (the default is {WIKITEXT}); {remedy}")
    for shard in shards:
        for row in _read_parquet(field, shard, {"text": True}):
            yield row["text"] or ""
