"""Reads records from files of text and instructions: lines, JSON, parquet and Arrow, in one file or many shards.

These readers are our own, because they must name each wrong record with its file and line, use little memory and write
no cache. pyarrow reads the tables.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indraquantum.errors import UserError
from indraquantum.files import read_json, unreadable

if TYPE_CHECKING:
    import pyarrow

TEXT_SUFFIXES = (".tokens", ".raw", ".txt")
JSON_SUFFIXES = (".json", ".jsonl")
TABLE_SUFFIXES = (".parquet", ".arrow")
NOTHING: tuple[Any, ...] = (None, "", [], {})  # values of a field that mean it is empty
TABLE_ROWS = 1024  # read at once
MAX_LINE_BYTES = 16 << 20  # a longer line is not a paragraph; it is not read, so that memory stays small
SPLIT_WORD = re.compile(r"(?<![a-z])(train(?:ing)?|valid(?:ation)?|dev|test|eval)(?![a-z])")


class Reading:
    """What is found while a source is read: wrong records, and parts that are not used."""

    def __init__(self, field: str, skip: bool = False) -> None:
        """Begin with nothing.

        Args:
            field: The option to name in an error.
            skip: Skip wrong records instead of refusing the source.
        """
        self.field, self.skip = field, skip
        self.skipped: list[dict[str, str]] = []  # file and reason of each wrong record that was skipped
        self.left_out: Counter[str] = Counter()  # parts that are not documents, by kind
        self.unused_fields: Counter[str] = Counter()  # records that have something in a field that is not used
        self.notes: dict[str, None] = {}  # sentences on how the source was read, in order

    def add(self, path: Path, reason: str) -> None:
        """Raise UserError for a wrong record of the file `path`, or note it if wrong records are skipped."""
        if not self.skip:
            raise UserError(self.field, path, reason)
        self.skipped.append({"file": readable(str(path)), "reason": readable(reason)})

    def nothing(self, name: str, wanted: str) -> UserError:
        """Return the error for a source without a single `wanted`; it says what was wrong with the first record."""
        told = ""
        if self.left_out:
            told = f"; left out {listed(self.left_out)}"
        if self.skipped:
            told += f"; {counted(len(self.skipped), 'wrong record')}, first: {self.skipped[0]['reason']}"
        return UserError(self.field, name, f"must hold at least one {wanted}{told}")

    def note(self, sentence: str) -> None:
        """Keep a sentence on how the source was read; each sentence is kept once."""
        self.notes[readable(sentence)] = None


def counted(number: int, what: str) -> str:
    """Return a number and what it counts, in the singular or the plural."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def samples_have(number: int) -> str:
    """Return the beginning of a sentence about this many samples."""
    return f"{counted(number, 'sample')} {'has' if number == 1 else 'have'}"


def listed(counts: Mapping[str, int]) -> str:
    """Return counts of several kinds in words."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def readable(text: str) -> str:
    """Return `text` on one line, with escapes for characters that can't be printed or stored."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def source_files(field: str, name: str, suffixes: tuple[str, ...], remedy: str, reading: Reading) -> list[Path]:
    """Find the files of a source, in sorted order.

    Args:
        field: The option to name in an error.
        name: A file, a folder of shards, a folder of `save_to_disk`, or a glob such as `shards/*.parquet`.
        suffixes: The endings that can be read.
        remedy: What to give instead, for errors.
        reading: Collects what is left out: other files, folders, other splits, empty shards.

    Raises:
        UserError: there is nothing, nothing that can be read, or the files of a folder differ in kind.
    """
    path = Path(name)
    if path.is_dir():
        return _folder_files(field, path, suffixes, remedy, reading)
    if glob.has_magic(name) and not path.exists():
        found = sorted(Path(found) for found in glob.glob(name, recursive=True) if Path(found).is_file())
        if not found:
            raise UserError(field, name, f"matches no file; {remedy}")
    else:
        found = [path]
    for file in found:
        if not file.exists():
            raise UserError(field, file, f"does not exist; {remedy}")
        if not file.is_file() or file.suffix not in suffixes:
            raise UserError(field, file, f"has an unknown ending {file.suffix!r}; {remedy}")
    return _without_empty(field, found, reading)


def _folder_files(field: str, folder: Path, suffixes: tuple[str, ...], remedy: str, reading: Reading) -> list[Path]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            return _saved_dataset(field, folder, reading)
        except (KeyError, TypeError, AttributeError) as error:
            allowed = (
                f"is not a complete folder as datasets' save_to_disk writes it ({type(error).__name__}: "
                f"{error}); {remedy}"
            )
            raise UserError(field, folder, allowed) from None
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in visible if path.is_file() and path.suffix in suffixes]
    if not found:
        inside = ", ".join([path.name for path in visible if path.is_dir()][:5])
        more = f", only folders ({inside})" if inside else ""
        raise UserError(field, folder, f"holds no file that can be read{more}; {remedy}")
    if len(kinds := sorted({file.suffix for file in found})) > 1:
        raise UserError(
            field, folder, f"is a folder of {' and '.join(kinds)} files; give a glob such as {folder}/*{kinds[-1]}"
        )
    splits = {file: SPLIT_WORD.findall(file.name.lower()) for file in found}
    training = [file for file in found if any(word.startswith("train") for word in splits[file])]
    of_no_split = [file for file in found if not splits[file]]
    chosen = training or of_no_split or found
    taken = _without_empty(field, chosen, reading)
    others = [f"{path.name}/" if path.is_dir() else path.name for path in visible if path not in chosen]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        read = taken[0].name if len(taken) == 1 else f"{len(taken)} files"
        reading.note(f"read {read} of the folder and left out {', '.join(others[:5])}{more}")
    return taken


def _without_empty(field: str, files: list[Path], reading: Reading) -> list[Path]:
    """Leave out empty shards, and say so. If all files are empty, all stay, and reading them raises the error."""
    empty = [file for file in files if _is_empty(field, file)] if len(files) > 1 else []
    if not empty or len(empty) == len(files):
        return files
    reading.note(f"left out {counted(len(empty), 'empty file')}, such as {empty[0].name}")
    return [file for file in files if file not in empty]


def _is_empty(field: str, file: Path) -> bool:
    """Return whether a file has no byte, or, unless it is a table, nothing but blank lines."""
    if file.suffix in TABLE_SUFFIXES:
        return not file.stat().st_size
    return not _first_lines(field, file)[0]


def _saved_dataset(field: str, folder: Path, reading: Reading) -> list[Path]:
    """The Arrow files of a dataset that `save_to_disk` of the `datasets` library wrote, in its own order."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(field, folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            allowed = f"has no split 'train' but {', '.join(splits)}; give the folder of one of them"
            raise UserError(field, folder, allowed)
        if len(splits) > 1:
            reading.note(f"read the split train and left out {', '.join(s for s in splits if s != 'train')}")
        folder /= "train"
    state = read_json(field, folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            field,
            folder,
            "holds a selection of rows that is not written out; save it again with datasets' save_to_disk",
        )
    return [folder / entry["filename"] for entry in state["_data_files"]]


def text_lines(field: str, path: Path, reading: Reading) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, numbered from 1, with or without a byte order mark."""
    blank, offset, number = True, 0, 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                start, offset = offset, offset + len(line)
                if len(line) > MAX_LINE_BYTES:
                    reading.add(path, f"line {number} must be at most {MAX_LINE_BYTES} bytes long")
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                        offset += len(line)
                    continue
                blank = blank and not line.strip()
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    reading.add(path, f"must be UTF-8 text (byte {start + error.start} is not) in line {number}")
                else:
                    yield number, text
    except OSError as error:
        raise unreadable(field, path, error) from None
    if blank and not reading.skipped:
        raise UserError(field, path, "must not be empty")


def json_records(field: str, path: Path, reading: Reading) -> Iterator[Any]:
    """Yield the records of a JSON file: the items of a list, or one object a line, whatever the file's ending.

    A file with one object a line is read line by line, any other as a whole. If a file can't be read as a whole but has
    an object in its second line, its first line is wrong.
    """
    first, second = _first_lines(field, path)
    if first.startswith(b"[") or (not _is_object(first) and (path.suffix == ".json" or first.startswith(b"{"))):
        values = _json_values(field, path, in_doubt_lines=path.suffix == ".jsonl" or _is_object(second))
        if values is not None:
            yield from values
            return
    for number, line in text_lines(field, path, reading):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.add(path, _json_reason(error, number))
        else:
            yield item


def _first_lines(field: str, path: Path) -> list[bytes]:
    """Return the first two lines that are not blank, or their beginnings; empty ones if there are fewer."""
    found: list[bytes] = []
    try:
        with open(path, "rb") as file:
            while len(found) < 2 and (line := file.readline(MAX_LINE_BYTES)):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    found.append(line)
    except OSError as error:
        raise unreadable(field, path, error) from None
    return [*found, b"", b""][:2]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_values(field: str, path: Path, in_doubt_lines: bool) -> list[Any] | None:
    """Return the items of a file that is one list, or the values of a file that holds several, one after the other.

    Returns:
        The items; None if `in_doubt_lines` is set and the file is neither one list nor only objects.
    """
    text = read_text(field, path)
    decoder, place, values = json.JSONDecoder(), 0, []
    try:
        while place < len(text):
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            if place < len(text):
                value, place = decoder.raw_decode(text, place)
                values.append(value)
    except (ValueError, RecursionError) as error:
        if in_doubt_lines:
            return None
        raise UserError(field, path, _json_reason(error)) from None
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    return None if in_doubt_lines and not all(isinstance(value, dict) for value in values) else values


def _json_reason(error: Exception, line: int | None = None) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"must be JSON; {error.msg.removesuffix(' at')} (line {line or error.lineno})"
    where = f" (line {line})" if line else ""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
    return f"must be JSON that can be read; {reason}{where}"


def read_text(field: str, path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark, that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(field, path, error) from None
    if not text.strip():
        raise UserError(field, path, "must not be empty")
    return text


def table_rows(field: str, path: Path, choose: Callable[[pyarrow.Schema], list[str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet or Arrow file as dicts of the columns that `choose` takes from its schema.

    Raises:
        UserError: it can't be read; a column is there twice; or what `choose` raises.
    """
    import pyarrow

    try:
        yield from (_parquet_rows if path.suffix == ".parquet" else _arrow_rows)(field, path, choose)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        kind = "a parquet" if path.suffix == ".parquet" else "an Arrow"
        raise UserError(field, path, f"must be {kind} file that can be read ({reason})") from None


def _parquet_rows(field: str, path: Path, choose: Callable[[pyarrow.Schema], list[str]]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = _once(field, path, file.schema_arrow, choose(file.schema_arrow))
        for batch in file.iter_batches(TABLE_ROWS, columns=columns):
            yield from _as_python(field, path, batch)


def _arrow_rows(field: str, path: Path, choose: Callable[[pyarrow.Schema], list[str]]) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        opened = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        columns = _once(field, path, opened.schema, choose(opened.schema))
        batches = (opened.get_batch(n) for n in range(opened.num_record_batches)) if is_file else opened
        for batch in batches:
            for start in range(0, batch.num_rows, TABLE_ROWS):
                yield from _as_python(field, path, batch.select(columns).slice(start, TABLE_ROWS))


def _as_python(field: str, path: Path, batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of `batch`. A date or time becomes True: Python has none with nanoseconds, or after 9999."""
    import pyarrow.compute

    for place, column in enumerate(batch.columns):
        kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
        if pyarrow.types.is_temporal(kind):
            present = pyarrow.compute.is_valid(column)
            there = pyarrow.compute.if_else(present, True, pyarrow.scalar(None, pyarrow.bool_()))
            batch = batch.set_column(place, batch.schema.names[place], there)
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise UserError(field, path, "must hold UTF-8 text; the bytes of a column are not UTF-8") from None
    except (ValueError, OverflowError):  # a date or time inside of a list or a struct
        names = ", ".join(name for name in batch.schema.names if not _held_by_python(batch.column(name)))
        allowed = f"must have dates and times that Python can hold; remove the column {names}"
        raise UserError(field, path, allowed) from None


def _held_by_python(column: pyarrow.Array) -> bool:
    try:
        column.to_pylist()
    except (ValueError, OverflowError):
        return False
    return True


def _once(field: str, path: Path, schema: pyarrow.Schema, columns: list[str]) -> list[str]:
    for name in columns:
        if schema.names.count(name) > 1:
            raise UserError(field, path, f"must have one column {name!r}, not {schema.names.count(name)}")
    return columns


def check_text_column(field: str, path: Path, schema: pyarrow.Schema, name: str) -> None:
    """Check that a column holds text.

    Raises:
        UserError: it holds something else, or is there twice.
    """
    import pyarrow

    _once(field, path, schema, [name])
    kind = schema.field(name).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view", "is_null")
    if not any(getattr(pyarrow.types, test)(value) for test in tests):
        raise UserError(field, path, f"column {name!r} must be text; it is {kind}")


def kind_of(value: object) -> str:
    """Return what a JSON value is, for errors."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return f"it is {names.get(type(value), 'a number')}"


def wrong_text(text: object) -> str | None:
    """Return what is wrong with a text, as the end of a sentence, or None."""
    if not isinstance(text, str):
        return kind_of(text)
    if not text.isascii() and not is_text(text):
        return "it holds half of a surrogate pair, which is not valid text"
    if len(text) > MAX_LINE_BYTES:
        return f"it must be at most {MAX_LINE_BYTES} characters long, and has {len(text)}"
    return None


def is_text(text: str) -> bool:
    """Return whether `text` is free of half surrogate pairs, which no tokenizer can read.

    JSON can hold them, and Python uses them for bytes of the command line that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
