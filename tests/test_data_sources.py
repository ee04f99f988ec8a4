"""Sources: what a sample is, every file type, and each bad input as one line."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indraquantum.config import WIKITEXT, PrepareSettings
from indraquantum.data.instructions import AlpacaSample, alpaca_samples
from indraquantum.data.prepare import prepare
from indraquantum.data.prompt import format_alpaca
from indraquantum.data.records import Reading
from indraquantum.data.sources import read_wikitext
from indraquantum.errors import UserError

WIKI_LINES = [
    " \n",
    " = Title = \n",
    " \n",
    " One <unk> @-@ line . \n",
    " = = Part = = \n",
    "\tTwo\u2028lines \n",
    " = 3 \n",
]
PARAGRAPHS = ["One <unk> @-@ line .", "Two\u2028lines", "= 3"]
ITEMS = [
    {"instruction": "Say ä", "input": "", "output": "ä"},
    {"instruction": "Add", "input": "2 3", "output": "5"},
    {"instruction": "Stay silent", "output": ""},
]
SAMPLES = [AlpacaSample("Say ä", "", "ä"), AlpacaSample("Add", "2 3", "5"), AlpacaSample("Stay silent", "", "")]


def read_alpaca(field, name, **options):
    return list(alpaca_samples(field, name, **options))


@pytest.mark.parametrize("suffix", [".tokens", ".raw", ".txt"])
def test_wikitext_of_text_files(tmp_path, suffix):
    path = tmp_path / f"wiki{suffix}"
    path.write_text("".join(WIKI_LINES), encoding="utf-8")
    assert read_wikitext("--wikitext", str(path)) == PARAGRAPHS


def test_windows_text_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(WIKI_LINES).replace("\n", "\r\n").encode())
    assert read_wikitext("--wikitext", str(path)) == PARAGRAPHS


def test_wikitext_of_parquet(tmp_path):
    path = tmp_path / "wiki.parquet"
    pq.write_table(pa.table({"other": range(8), "text": [*WIKI_LINES, None]}), path)
    assert read_wikitext("--wikitext", str(path)) == PARAGRAPHS


def test_alpaca_of_every_kind(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ITEMS, ensure_ascii=False), encoding="utf-8")
    lines = [json.dumps(item) for item in ITEMS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    columns = {key: [item.get(key) for item in ITEMS] for key in ("instruction", "input", "output")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read_alpaca("--alpaca", str(tmp_path / name)) == SAMPLES, name


def test_the_prompt_to_the_letter():
    assert format_alpaca("Add", "2 3", "5") == "### Instruction:\nAdd\n\n### Input:\n2 3\n\n### Response:\n5"
    assert format_alpaca("Add 2 and 3", "", "5") == "### Instruction:\nAdd 2 and 3\n\n### Response:\n5"
    assert format_alpaca("Add", "2 3") == "### Instruction:\nAdd\n\n### Input:\n2 3\n\n### Response:\n"


def refused(read, field, path, *words):
    with pytest.raises(UserError) as caught:
        read(field, str(path))
    message = str(caught.value)
    assert caught.value.field == field
    assert "\n" not in message
    for word in words:
        assert word in message, message


BAD_ALPACA = [
    (".json", b"", "must not be empty"),
    (".json", b"[]", "at least one instruction"),
    (".json", b'{"data": [{"instruction": "a", "output": "b"}]}', "item 1", "'instruction'", "it has 'data'"),
    (".json", b'{"data": [\n  {"instruction": "a", "output": "b"}\n]}', "item 1", "'instruction'", "it has 'data'"),
    (".json", b'[{"instruction": "a", "output": "b"}, "text"]', "item 2", "it is a text"),
    (".json", b'[{"instruction": "a", "input": ""}]', "item 1", "'output'", "missing"),
    (".json", b'[{"instruction": ["a"], "output": "b"}]', "item 1", "'instruction'", "a list"),
    (".json", b'[{"instruction": "a", "input": 3, "output": "b"}]', "item 1", "'input'", "a number"),
    (".json", b'[{"instruction": "a", "output": "\\ud800"}]', "item 1", "surrogate"),
    (".json", b'[{"instruction": {"text": "a"}, "output": "b"}]', "item 1", "'instruction'", "an object"),
    (".json", b'[{"instruction": null, "output": "b"}]', "item 1", "'instruction'", "null"),
    (".json", '[{"instruction": "a", "output": "b"}]'.encode("utf-16"), "must be UTF-8", "byte 0"),
    (
        ".jsonl",
        b'{"instruction": "caf\xc3\xa9", "output": "b"}\n{"instruction": "caf\xe9", "output": "b"}\n',
        "must be UTF-8",
        "line 2",
    ),
    (".json", b'[{"instruction": "a"', "must be JSON", "line 1"),
    (".json", b"[" * 100_000, "must be JSON"),
    (".json", b"[" + b"9" * 5000 + b"]", "must be JSON"),
    (".json", b'[{"instruction": "\xff"}]', "must be UTF-8", "byte 18"),
    (".jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction"\n', "must be JSON", "line 2"),
    (".jsonl", b'{"instruction": "a", "output": "b"}\n[]\n', "item 2", "a list"),
    (".parquet", b"PAR1 and nothing else", "must be a parquet file"),
    (".csv", b"instruction,output\na,b\n", "unknown ending '.csv'"),
]


@pytest.mark.parametrize(("suffix", "content", "words"), [(case[0], case[1], case[2:]) for case in BAD_ALPACA])
def test_bad_alpaca(tmp_path, suffix, content, words):
    path = tmp_path / f"alpaca{suffix}"
    path.write_bytes(content)
    refused(read_alpaca, "--alpaca", path, "alpaca", *words)


def test_parquet_of_another_shape(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": ["a"]}), path)
    refused(read_alpaca, "--alpaca", path, "must have a column 'output'")
    pq.write_table(pa.table({"instruction": ["a"], "output": [3]}), path)
    refused(read_alpaca, "--alpaca", path, "column 'output' must be text")
    twice = pa.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    pq.write_table(twice, path)
    refused(read_alpaca, "--alpaca", path, "must have one column 'output', not 2")
    pq.write_table(pa.table({"instruction": ["a", None], "output": ["b", "c"]}), path)
    refused(read_alpaca, "--alpaca", path, "item 2", "'instruction'", "null")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(read_alpaca, "--alpaca", path, "must be a parquet file")
    refused(read_wikitext, "--wikitext", path, "must be a parquet file")


def test_a_damaged_parquet_is_read_or_refused_in_one_line(tmp_path):
    """Flip one bit anywhere, or cut anywhere. Pages have no checksum, so some flips only change the text."""
    rows = {"instruction": [f"Do {n}" for n in range(40)], "output": [f"Done {n * n}" for n in range(40)]}
    path, draw = tmp_path / "a.parquet", random.Random(0)
    pq.write_table(pa.table(rows), path)
    whole, refusals = path.read_bytes(), {"cut": [], "flip": []}
    for number in range(120):
        content, place = bytearray(whole), draw.randrange(len(whole))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content if number % 2 else whole[:place])
        try:
            read_alpaca("--alpaca", str(path))
        except UserError as error:
            refusals["flip" if number % 2 else "cut"].append(str(error))
    assert len(refusals["cut"]) == 60
    assert len(refusals["flip"]) > 20
    assert all(line.startswith("--alpaca: ") and "\n" not in line for lines in refusals.values() for line in lines)


def test_bad_wikitext(tmp_path):
    path = tmp_path / "wiki.tokens"
    refused(read_wikitext, "--wikitext", path, "does not exist", "--wikitext PATH")
    path.write_bytes(b"")
    refused(read_wikitext, "--wikitext", path, "must not be empty")
    path.write_text(" = Only = \n = = Headings = = \n")
    refused(read_wikitext, "--wikitext", path, "at least one paragraph")
    path.write_bytes(b"good\nb\xe4d\n")
    refused(read_wikitext, "--wikitext", path, "must be UTF-8 text (byte 6 is not)")
    path.write_bytes("in UTF-16\n".encode("utf-16"))
    refused(read_wikitext, "--wikitext", path, "must be UTF-8 text (byte 0 is not)")
    path.rename(tmp_path / "wiki.doc")
    refused(read_wikitext, "--wikitext", tmp_path, "holds no file that can be read")
    refused(read_wikitext, "--wikitext", tmp_path / "wiki.doc", "unknown ending '.doc'")


def test_missing_files_and_no_network(tmp_path):
    refused(read_alpaca, "--alpaca", tmp_path / "alpaca.json", "does not exist", "--alpaca PATH")
    refused(read_wikitext, "--wikitext", WIKITEXT, "hub can't be reached", "--wikitext PATH")
    refused(read_wikitext, "--wikitext", "nothing", "does not exist")


def test_all_that_is_missing_is_said_at_once(tmp_path, world, monkeypatch, deaf_server):
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "cache"))
    alpaca = f"{deaf_server}/alpaca.json"
    nowhere = {
        "tokenizer": "nobody/tokenizer", "wikitext": "nobody/text", "alpaca": alpaca,
        "output": tmp_path / "out" / "d.pkl",
    }  # fmt: skip
    words = {
        "tokenizer": (
            "--tokenizer: got nobody/tokenizer; is not a local file, and the Hugging Face hub can't be reached"
        ),
        "wikitext": (
            "--wikitext: got nobody/text; is not a local file, and the Hugging Face hub can't be reached; give a "
        ),
        "alpaca": f"--alpaca: got {alpaca}; could not be downloaded ([Errno {errno.ECONNREFUSED}] Connection ref",
    }
    for there in ((), ("tokenizer",), ("wikitext",), ("tokenizer", "alpaca")):
        with pytest.raises(UserError) as error:
            prepare(PrepareSettings(**nowhere | {name: str(getattr(world, name)) for name in there}))
        assert [name for name, said in words.items() if said in str(error.value)] == [
            n for n in words if n not in there
        ]
        assert "\n" not in str(error.value)
    # a mistake is said before anything is downloaded
    with pytest.raises(UserError, match=r"^--tokenizer: .* has no tokenizer") as error:
        prepare(PrepareSettings(**nowhere | {"tokenizer": str(tmp_path)}))
    assert "--wikitext" not in str(error.value)
    assert not (tmp_path / "out").exists()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
KEYS = st.sampled_from(["instruction", "input", "output", "id"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)


def fuzz(path, read, field):
    """Read strictly and leniently: one line that names the field, or samples without a word of complaint."""
    skipping = Reading(field, skip=True)
    strict = lenient = None
    try:
        strict = read(field, str(path))
    except UserError as error:
        message = str(error)
        if "\n" in message or not message.startswith(f"{field}: "):
            raise AssertionError(message) from error
    with contextlib.suppress(UserError):
        lenient = read(field, str(path), reading=skipping)
    assert strict is None or lenient is None or len(strict) == len(lenient) + len(skipping.skipped)
    return lenient


@given(st.lists(VALUES, max_size=4))
def test_any_json_is_read_or_refused(tmp_path_factory, items):
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzz.json").write_text(json.dumps(items))
    (folder / "fuzz.jsonl").write_text("\n".join(map(json.dumps, items)))
    whole, lines = (fuzz(folder / name, read_alpaca, "--alpaca") for name in ("fuzz.json", "fuzz.jsonl"))
    good = [item for item in items if isinstance(item, dict)]
    good = [item for item in good if all(isinstance(item.get(key), str) for key in ("instruction", "output"))]
    good = [item for item in good if item["output"].strip() and isinstance(item.get("input", ""), str | None)]
    assert [sample.output for sample in whole or []] == [item["output"] for item in good]
    if not (len(items) == 1 and isinstance(items[0], list)):  # a list alone is the whole file's
        assert (whole or []) == (lines or [])


@given(st.binary(max_size=120), st.sampled_from([".json", ".jsonl", ".parquet"]))
def test_any_bytes_are_instructions_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    fuzz(path, read_alpaca, "--alpaca")


@given(st.lists(st.one_of(TEXT.map(str.encode), st.binary(max_size=20)), max_size=6))
def test_any_bytes_are_text_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "bytes.txt"
    path.write_bytes(b"\n".join(lines))
    texts = fuzz(path, read_wikitext, "--wikitext")
    assert all(text == text.strip() != "" for text in texts or [])


@pytest.mark.parametrize(
    ("name", "read", "field"), [("a.txt", read_wikitext, "--wikitext"), ("a.jsonl", read_alpaca, "--alpaca")]
)
def test_a_long_line_is_never_read_whole(tmp_path, name, read, field):
    """A line of 1 GB (a sparse file) is refused quickly, and the rest of the file is not read."""
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(b'{"instruction": "a", "output": "b"}\n')
        file.truncate(1 << 30)
    tracemalloc.start()
    refused(read, field, path, "line 2 must be at most 16777216 bytes long")
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
