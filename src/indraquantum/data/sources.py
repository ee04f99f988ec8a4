"""Reading the two kinds of text: WikiText's paragraphs and Stanford Alpaca's instructions.

WikiText is kept as it is, its own tokenisation (` @-@ `) and its `<unk>` among it: `<unk>` is five characters of text
here, never the tokenizer's unknown token, because a model that can write it is honest about what it was shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum.config import WIKITEXT
from indraquantum.data.download import download_url, hub_files
from indraquantum.errors import UserError

WIKITEXT_CONFIGURATION = "wikitext-103-v1"
TEXT_SUFFIXES = (".tokens", ".raw", ".txt")
WIKITEXT_REMEDY = "give a .tokens, .raw, .txt or .parquet file with --wikitext PATH"
ALPACA_REMEDY = "give Stanford Alpaca's alpaca_data.json with --alpaca PATH"


class AlpacaSample(NamedTuple):
    """One instruction with its answer."""

    instruction: str
    input: str  # empty where the instruction needs none
    output: str


def read_wikitext(field: str, name: str) -> list[str]:
    """Read WikiText's paragraphs: the lines that are neither blank nor a heading, stripped of surrounding space.

    Args:
        field: The option to name in an error.
        name: A .tokens, .raw, .txt or .parquet file (column `text`, a line a row), or a hub id with the files of
            configuration wikitext-103-v1.

    Raises:
        UserError: missing, empty, not UTF-8, not parquet, or the hub can't be reached.
    """
    path = Path(name)
    if path.is_file() and path.suffix in TEXT_SUFFIXES:
        lines: Iterable[str] = _read_text(field, path).split("\n")
    elif path.is_file() and path.suffix == ".parquet":
        lines = (row["text"] or "" for row in _read_parquet(field, path, {"text": True}))
    elif path.exists() or path.suffix in (*TEXT_SUFFIXES, ".parquet") or name.count("/") != 1 or name[0] in "./~":
        _refuse_file(field, path, WIKITEXT_REMEDY)
    else:
        lines = _hub_lines(field, name)
    paragraphs = [line for line in map(str.strip, lines) if line and not is_heading(line)]
    if not paragraphs:
        raise UserError(field, name, "must hold at least one paragraph that is no heading")
    return paragraphs


def is_heading(line: str) -> bool:
    """Whether a stripped line is one of WikiText's headings: `= Title =`, `= = Section = =`."""
    return line.startswith("= ") and line.endswith(" =") and len(line) > 3


def read_alpaca(field: str, name: str) -> list[AlpacaSample]:
    """Read instructions in Stanford Alpaca's form: objects with texts `instruction`, `output` and, maybe, `input`.

    Args:
        field: The option to name in an error.
        name: A .json list, a .jsonl with one object a line, a .parquet with those columns, or a URL of one of them.

    Raises:
        UserError: missing, empty, not UTF-8, of another shape (the first wrong item is named), or no network.
    """
    remote = name.startswith(("http://", "https://"))
    path = download_url(field, name, ALPACA_REMEDY) if remote else Path(name)
    if not path.is_file() or path.suffix not in (".json", ".jsonl", ".parquet"):
        _refuse_file(field, path, "give a .json, .jsonl or .parquet file with --alpaca PATH")
    if path.suffix == ".json":
        items = _parse_json(field, path, _read_text(field, path), "")
        if not isinstance(items, list):
            allowed = f"must be a JSON list of instructions, objects with instruction, input and output; {_kind(items)}"
            raise UserError(field, path, allowed)
    elif path.suffix == ".jsonl":
        lines = enumerate(_read_text(field, path).split("\n"), start=1)
        items = [_parse_json(field, path, line, f" (line {number})") for number, line in lines if line.strip()]
    else:
        items = _read_parquet(field, path, {"instruction": True, "input": False, "output": True})
    if not items:
        raise UserError(field, path, "must hold at least one instruction")
    return [_sample(field, path, number, item) for number, item in enumerate(items, start=1)]


def _sample(field: str, path: Path, number: int, item: Any) -> AlpacaSample:
    """Check one item; null stands for an empty input, as parquet files have it."""
    if not isinstance(item, dict):
        raise UserError(field, path, f"item {number} must be an object with instruction and output; {_kind(item)}")
    fields = []
    for key in AlpacaSample._fields:
        text = item.get(key)
        if key == "input" and text is None:
            text = ""
        if not isinstance(text, str):
            reason = _kind(text) if key in item else "it is missing"
            raise UserError(field, path, f"item {number} must have a text {key!r}; {reason}")
        if not text.isascii():
            _check_encodable(field, path, f"item {number}", text)
        fields.append(text)
    return AlpacaSample(*fields)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return f"it is {names.get(type(value), 'a number')}"


def _check_encodable(field: str, path: Path, where: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell but no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(field, path, f"{where} holds half a surrogate pair, which is no text") from None


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


def _read_parquet(field: str, path: Path, columns: dict[str, bool]) -> list[dict[str, Any]]:
    """Read text columns of a parquet file as dicts; `columns` says of each whether it is required."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [name for name, required in columns.items() if required and name not in there]
            if missing:
                raise UserError(field, path, f"must have a column {missing[0]!r}; it has {', '.join(there)}")
            table = file.read(columns=[name for name in columns if name in there])
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(field, path, f"must be a parquet file that can be read ({reason})") from None
    for name, kind in zip(table.schema.names, table.schema.types, strict=True):
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
            raise UserError(field, path, f"column {name!r} must be text; it is {kind}")
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        raise UserError(field, path, "must hold UTF-8 text; a column's bytes are not") from None


def _hub_lines(field: str, name: str) -> Iterable[str]:
    """Read the training lines of a WikiText repository of the hub, shard by shard."""
    pattern = f"{WIKITEXT_CONFIGURATION}/train-*.parquet"
    folder = hub_files(field, name, [pattern], "dataset", WIKITEXT_REMEDY)
    shards = sorted(folder.glob(pattern))
    if not shards:
        raise UserError(field, name, f"has no {pattern} on the hub (the default is {WIKITEXT}); {WIKITEXT_REMEDY}")
    for shard in shards:
        for row in _read_parquet(field, shard, {"text": True}):
            yield row["text"] or ""
