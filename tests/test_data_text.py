"""What a document of a text is: stories between markers, records, rows, shards; the same by every kind of file."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indraquantum.config import PrepareSettings
from indraquantum.data import sources
from indraquantum.data.mixture import draw_sources
from indraquantum.data.records import Reading
from indraquantum.data.sources import read_wikitext
from indraquantum.errors import UserError

STORIES = [
    f"Once there was a fox number {n}.\n\nIt ran along the road = until = night came.\nThe end." for n in range(9)
]
MARKER = "<|endoftext|>"


def read(path, **options):
    reading = Reading("--text")
    return read_wikitext("--text", str(path), reading=reading, **options), reading


def written(path, texts):
    """Write a record for each of `texts`, as the suffix of `path` says, and return it."""
    objects = [{"text": text} for text in texts]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("\n".join(map(json.dumps, objects)) if path.suffix == ".jsonl" else json.dumps(objects))
    return path


@pytest.mark.parametrize(
    ("between", "options"),
    [
        ("\n<|endoftext|>\n", {}),
        ("\r\n <|endoftext|> \r\n", {}),
        ("<|endoftext|>\n", {}),  # at a line's end
        ("\n</s>\n", {}),
        ("\n<|endoftext|>\n", {"separator": "<|endoftext|>", "documents": "records"}),
        ("\n* * *\n", {"separator": "* * *"}),
        ("<|sep|>", {"separator": "<|sep|>"}),
    ],
)
def test_a_story_between_markers_is_one_document(tmp_path, monkeypatch, between, options):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)  # markers lie across the borders of what is searched at once
    path = tmp_path / "stories.txt"
    content = between + between.join(STORIES)
    if "\r" in between:
        content = "\ufeff" + content.replace("\r\n", "\n").replace("\n", "\r\n")
    for end in ("", between, between * 2):
        path.write_bytes((content + end).encode())
        found, reading = read(path, **options)
        assert found == STORIES
    assert reading.left_out["separators"] == 11


def test_a_marker_is_never_a_document_and_nothing_else_is_a_marker(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{MARKER}\n".join(STORIES[:2]) + f"\n{MARKER}\n")
    lines = [line for story in STORIES[:2] for line in story.split("\n") if line]
    found, reading = read(path, documents="paragraphs")
    assert (found, reading.left_out["separators"]) == (lines, 2)
    assert MARKER in read(path, separator="none")[0], "asked for"
    path.write_text("One line tells of <|endoftext|> and </s> .\nAnother ends with it: </s>\n")
    assert len(read(path)[0]) == 2
    path.write_text("a\nb\n\n\nc\n \nd\n")
    assert read(path, separator="blank-line")[0] == ["a\nb", "c", "d"]
    assert read(path, documents="records")[0] == ["a\nb\n\n\nc\n \nd"]
    assert read(path)[0] == ["a", "b", "c", "d"]


def write_every_kind(folder, texts):
    """The same texts as files of every kind; their names."""
    (folder / "a.txt").write_text(f"\n{MARKER}\n".join(texts))
    objects = [{"text": text, "url": f"u{n}"} for n, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    (folder / "a.json").write_text(json.dumps(objects))
    (folder / "b.json").write_text("\n".join(map(json.dumps, objects)))
    kinds = {
        "s": pa.string(),
        "l": pa.large_string(),
        "v": pa.string_view(),
        "d": pa.dictionary(pa.int32(), pa.string()),
    }
    for name, kind in kinds.items():
        table = pa.table({"url": [o["url"] for o in objects], "text": pa.array(texts).cast(kind)})
        pq.write_table(table, folder / f"{name}.parquet")
        for end, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
            with new(folder / f"{name}-{end}.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    return sorted(path.name for path in folder.iterdir())


def test_every_kind_of_file_has_the_same_documents(tmp_path):
    names = write_every_kind(tmp_path, STORIES)
    assert len(names) == 16
    for name in names:
        found, reading = read(tmp_path / name)
        assert found == STORIES, name
        assert set(reading.unused_fields) == ({"url"} if name != "a.txt" else set())
        shown = [line for story in STORIES for line in story.split("\n") if line]
        assert read(tmp_path / name, documents="paragraphs")[0] == shown, name


def test_shards_are_read_in_order_as_folder_and_as_glob(tmp_path):
    for n in range(3):
        pq.write_table(pa.table({"text": STORIES[3 * n : 3 * n + 3]}), tmp_path / f"train-0000{n}-of-00003.parquet")
    for name in (tmp_path, tmp_path / "*.parquet", tmp_path / "train-*"):
        found, reading = read(name)
        assert found == STORIES
    pq.write_table(pa.table({"text": ["of another split"]}), tmp_path / "validation-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("about")
    found, reading = read(tmp_path)
    assert found == STORIES
    assert "left out README.md, validation-00000-of-00001.parquet" in next(iter(reading.notes))
    assert len(read(tmp_path / "*.parquet")[0]) == 10, "a glob takes what it names"
    (tmp_path / "more.txt").write_text("more")
    wrong = {"": "folder of .parquet and .txt files; give a glob", "*.csv": "matches no file",
             "*.md": "unknown ending '.md'", "no.txt": "does not exist"}  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


LINES = ["", " = One = ", "a", " = = Part = = ", "b", "", " = Two = ", "c"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_two_shards_of_wikitexts_rows_are_its_lines(tmp_path, end):
    """WikiText-103 has a line in each row, with its line break, and an article may continue in the next shard."""
    for n, part in enumerate((LINES[:4], LINES[4:])):
        rows = [line and line + end for line in part]
        pq.write_table(pa.table({"text": rows}), tmp_path / f"train-0000{n}-of-00002.parquet")
    (tmp_path / "wiki.txt").write_text("\n".join(LINES))
    for name in (tmp_path / "train-*", tmp_path / "wiki.txt"):
        found, reading = read(name)
        assert (found, reading.left_out["headings"]) == (["a", "b", "c"], 3)
        assert read(name, documents="articles")[0] == ["= One =\na\n= = Part = =\nb", "= Two =\nc"]


def test_a_folder_that_is_no_whole_save_to_disk_is_refused(tmp_path):
    incomplete = "is not a complete folder as datasets' save_to_disk writes it"
    for name, content, said in (
        ("state.json", "[]", rf"{incomplete} \(AttributeError: "),
        ("state.json", "{}", rf"{incomplete} \(KeyError: '_data_files'\)"),
        ("dataset_dict.json", "3", rf"{incomplete} \(AttributeError: "),
        ("dataset_dict.json", '{"splits": ["train"]}', r"train/state\.json; must be a file that can be read"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=said) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()


def test_a_file_without_the_markers_of_its_neighbour_is_read_as_it_would_be_alone(tmp_path):
    (tmp_path / "a.txt").write_text(f"\n{MARKER}\n".join(STORIES))
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert read(tmp_path)[0] == [*STORIES, "one", "two"]


def test_where_all_records_are_skipped_the_first_reason_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    with pytest.raises(
        UserError, match=r"at least one paragraph .*; 2 wrong records, first: record 1 must have a text"
    ):
        read_wikitext("--text", str(tmp_path / "a.jsonl"), reading=Reading("--text", skip=True))


def test_articles_end_at_separators_and_where_a_record_ends(tmp_path):
    articles = [story.replace("\n\n", "\n") for story in STORIES]  # blank lines don't belong to them
    write_every_kind(tmp_path, STORIES)
    for name in ("a.txt", "a.jsonl", "s.parquet"):
        assert read(tmp_path / name, documents="articles")[0] == articles


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_rows_that_are_lines_with_markers_between_are_stories(tmp_path, end):
    rows = [line + end for story in STORIES for line in [*story.split("\n"), MARKER]]
    pq.write_table(pa.table({"text": rows}), tmp_path / "lines.parquet")
    assert read(tmp_path / "lines.parquet")[0] == STORIES


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_each_json_object_is_a_document_also_if_there_are_separators(tmp_path, name):
    objects = [{"text": text} for text in ("First.", "Second.", f"Third.{MARKER}", "Fourth.")]
    (tmp_path / name).write_text("\n".join(map(json.dumps, objects)) if name == "a.jsonl" else json.dumps(objects))
    for documents in ("auto", "records"):
        assert read(tmp_path / name, documents=documents)[0] == ["First.", "Second.", "Third.", "Fourth."]
        found, _ = read(tmp_path / name, documents=documents, separator="blank-line")
        assert found == ["First.", "Second.", f"Third.{MARKER}", "Fourth."]
    lines = [{"text": line} for line in LINES]  # of which articles consist, as those of a table do
    (tmp_path / name).write_text(json.dumps(lines))
    assert read(tmp_path / name, documents="articles")[0] == ["= One =\na\n= = Part = =\nb", "= Two =\nc"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("between", [f"\n{MARKER}\n", f"\r\n {MARKER} \r\n", f"{MARKER}\n", f"\n{MARKER}"])
def test_a_marker_on_a_line_inside_a_record_parts_it(tmp_path, name, between):
    texts = ["One line.", "Another.", between.join(STORIES[:3]), "HTML\n</s>\nin lines", "More."]
    found, reading = read(written(tmp_path / name, texts))
    assert found == [*texts[:2], *STORIES[:3], *texts[3:]]
    assert (reading.left_out["separators"], list(reading.notes)) == (2, [f"{MARKER} separates documents"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_about_markers_are_not_parted(tmp_path, name):
    texts = [
        f"The token is {MARKER}\nin GPT-2.",
        f'eos_token="{MARKER}"\nsets it,\n"{MARKER} ends it',
        f"See ({MARKER})\nand:",
    ]
    assert read(written(tmp_path / name, texts))[0] == texts


def test_a_separator_for_several_sources_leaves_json_objects_apart(tmp_path):
    parts, objects = [f"line {n}\nof text {n}" for n in range(20)], [f"object {n}" for n in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(parts))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in objects))
    texts = tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl"))
    chosen = PrepareSettings(wikitext_samples=0, alpaca_samples=0, text=texts, separator="blank-line")
    drawn = draw_sources(chosen).sources
    assert [set(source.read_texts()) for source in drawn] == [set(parts), set(objects)]


def test_folders_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": STORIES, "n": list(range(9))})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    data.select([8, 0, 3]).save_to_disk(tmp_path / "some")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "none")
    assert read(tmp_path / "one")[0] == STORIES
    assert read(tmp_path / "some")[0] == [STORIES[8], STORIES[0], STORIES[3]]
    found, reading = read(tmp_path / "dict")
    assert found == STORIES
    assert next(iter(reading.notes)) == "read the split train and left out test"
    with pytest.raises(UserError, match="no split 'train' but test"):
        read(tmp_path / "none")
    assert read(tmp_path / "none" / "test")[0] == STORIES


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"title": "b"}', ("record 2", "'text'", "it has 'title'")),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', ("record 2", "a list")),
        ("a.json", '[{"text": "a"}, 3]', ("record 2", "a number")),
        ("a.jsonl", '{"text": "\\ud800"}', ("record 1", "surrogate")),
        ("a.jsonl", '{"text": " "}\n{"text": null}', ("at least one paragraph",)),
        ("a.arrow", "no Arrow", ("must be an Arrow file",)),
        ("state.json", "{}", ("record 1", "'text'")),
    ],
)
def test_records_without_text_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_document_that_is_too_long_is_refused_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.txt").write_text(f"short\n{MARKER}\n" + "a line of it\n" * 9 + f"{MARKER}\nlast\n")
    with pytest.raises(UserError, match="at most 100 characters long; see 'a line of it'"):
        read(tmp_path / "a.txt")
    reading = Reading("--text", skip=True)
    assert read_wikitext("--text", str(tmp_path / "a.txt"), reading=reading) == ["short", "last"]
    assert len(reading.skipped) == 1


# The promise: a line of 40 or more characters is in one split only, for all kinds of sources, if few documents have it.

POOL = [f"the line with number {n} is long enough to count here" for n in range(40)] + ["short", "= a heading =", " "]
KINDS = ("lines.txt", "stories.txt", "rows.parquet", "records.jsonl", "shown.json", "instructions.json")


def write_kind(path, documents):
    if path.name == "lines.txt":
        path.write_text("\n".join(line for document in documents for line in document))
    elif path.name == "stories.txt":
        path.write_text(f"\n{MARKER}\n".join("\n".join(document) for document in documents))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": ["\r\n".join(document) for document in documents]}), path)
    elif path.name == "instructions.json":
        items = [{"instruction": f"Do {n}\n{document[0]}", "input": document[1], "output": "\n".join(document[2:])}
                 for n, document in enumerate(documents)]  # fmt: skip
        path.write_text(json.dumps(items))
    else:
        path.write_text("\n".join(json.dumps({"text": "\n".join(document)}) for document in documents))


DOCUMENTS = st.lists(st.lists(st.sampled_from(POOL), min_size=1, max_size=3), min_size=3, max_size=14)


WAYS = st.fixed_dictionaries(
    {"detokenize": st.booleans(), "duplicates": st.sampled_from(["keep", "exact", "near"]),
     "documents": st.sampled_from(["auto", "paragraphs", "articles", "records"])}
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), DOCUMENTS, st.sampled_from(["", "=2x", "=0.7x"])), min_size=1, max_size=3
    ),
    WAYS,
)
def test_no_line_is_in_two_parts_whatever_the_kind(tmp_path, sources, ways):
    texts, instructions = [], []
    for number, (kind, documents, amount) in enumerate(sources):
        path = tmp_path / str(number) / kind
        path.parent.mkdir(exist_ok=True)
        write_kind(path, [[f"own {number}", *document] for document in documents])
        (instructions if kind == "instructions.json" else texts).append(f"{path}{amount}")
    chosen = PrepareSettings(wikitext_samples=0, alpaca_samples=0, text=tuple(texts), instructions=tuple(instructions),
                             **ways)  # fmt: skip
    try:
        drawn = draw_sources(chosen).sources
    except UserError as error:
        if "share no paragraph" not in str(error):
            raise
        return
    parts = [set(), set(), set()]
    for source in drawn:
        for text, part in zip(source.read_texts(), source.parts, strict=True):
            parts[part] |= {line for line in text.splitlines() if len(line) >= 40}
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_sources_are_named_by_their_file_or_folder(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("part-1.txt", "part-2.txt"):
        (tmp_path / "shards" / name).write_text("a\nb\n")
    given = ("shards/*.txt", "shards/part-*.txt", "shards", "shards/part-1.txt")
    chosen = PrepareSettings(
        wikitext_samples=0, alpaca_samples=0, text=tuple(f"{tmp_path}/{name}" for name in given)
    )  # fmt: skip
    assert [source.name for source in draw_sources(chosen).sources] == ["shards", "part", "shards-2", "part-1"]


def test_no_source_is_named_as_all_of_them_are(tmp_path):
    (tmp_path / "all.txt").write_text("a\nb\n")
    chosen = PrepareSettings(wikitext_samples=0, alpaca_samples=0, text=(str(tmp_path / "all.txt"),) * 2)
    assert [source.name for source in draw_sources(chosen).sources] == ["all-2", "all-3"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_texts_that_a_marker_joins_are_parted_however_long_the_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    stories = [" ".join(story.split()) * 3 for story in STORIES]
    for between in (MARKER, "<|end_of_text|>"):
        joined = between.join(stories)
        (tmp_path / name).write_text(joined if name == "a.txt" else json.dumps({"text": joined}))
        found, reading = read(tmp_path / name)
        assert found == stories
        assert (reading.left_out["separators"], list(reading.notes)) == (8, [f"{between} separates documents"])
    for told in ('GPT-2 has "<|endoftext|>".\nb', "a `<|endoftext|>`b\nb", "a <|endoftext|> b\nb"):
        (tmp_path / "b.txt").write_text(told)
        assert read(tmp_path / "b.txt")[0] == told.split("\n"), "a text about markers"


def test_a_separator_that_is_nowhere_is_told(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(STORIES))
    _, reading = read(path, separator="###")
    assert list(reading.notes) == ["the separator '###' does not occur in it"]
    with pytest.raises(UserError, match="it gives 1 document; the separator '###' does not occur"):
        draw_sources(PrepareSettings(wikitext_samples=0, alpaca_samples=0, text=(str(path),), separator="###"))
    _, reading = read(path, separator="blank-line")
    assert not reading.left_out, "blank lines are not counted"


def test_a_column_of_nothing_is_no_unused_field_and_one_of_two_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": STORIES, "none": pa.nulls(9), "url": STORIES}), path)
    assert read(path)[1].unused_fields == {"url": 9}
    pq.write_table(pa.Table.from_arrays([pa.array(STORIES)] * 2, names=["text", "text"]), path)
    with pytest.raises(UserError, match="must have one column 'text', not 2"):
        read(path)


def test_a_folder_is_read_without_other_splits_and_folders_and_says_so(tmp_path):
    for name in ("corpus.jsonl", "test.jsonl", "my-validation-1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "old").mkdir()
    (tmp_path / ".cache").mkdir()
    found, reading = read(tmp_path)
    assert found == ["corpus.jsonl"]
    assert list(reading.notes) == [
        "read corpus.jsonl of the folder and left out my-validation-1.jsonl, old/, test.jsonl"
    ]
    (tmp_path / "corpus.jsonl").unlink()
    found, reading = read(tmp_path)
    assert found == ["my-validation-1.jsonl", "test.jsonl"], "nothing else is there"
    assert list(reading.notes) == ["read 2 files of the folder and left out old/"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".parquet"])
def test_empty_shards_are_left_out_but_an_empty_source_is_refused(tmp_path, suffix):
    for number in (0, 3):
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": [STORIES[number]]}), tmp_path / f"{number}{suffix}")
        else:
            content = f"line {number}\n" if suffix == ".txt" else json.dumps({"text": STORIES[number]})
            (tmp_path / f"{number}{suffix}").write_text(content)
    expected = read(tmp_path)[0]
    (tmp_path / f"1{suffix}").write_bytes(b"")
    (tmp_path / f"2{suffix}").write_bytes(b"" if suffix == ".parquet" else b"\xef\xbb\xbf\r\n \n")
    for name in (tmp_path, tmp_path / f"*{suffix}"):
        found, reading = read(name)
        assert found == expected
        assert next(iter(reading.notes)) == f"left out 2 empty files, such as 1{suffix}"
    for number in (0, 3):
        (tmp_path / f"{number}{suffix}").write_bytes(b"")
    with pytest.raises(UserError, match=f"0{suffix}; must "):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("separator", ["auto", "none"])
def test_records_are_lines_of_articles_only_if_one_is_a_title(tmp_path, name, separator):
    def articles(texts):
        return read(written(tmp_path / name, texts), documents="articles", separator=separator)[0]

    assert articles(["First.", "Second.", "Third\nof two lines."]) == ["First.", "Second.", "Third\nof two lines."]
    whole = "= Title =\nof an article in one record"
    assert articles(["First.", "Second.", whole]) == ["First.", "Second.", whole]
    assert articles(["= Title =", "First.", "Second.", "= Other =", "Third."]) == [
        "= Title =\nFirst.\nSecond.", "= Other =\nThird."
    ]  # fmt: skip


def test_rows_between_markers_make_up_articles(tmp_path):
    rows = [line for story in STORIES for line in [*story.split("\n"), MARKER]]
    pq.write_table(pa.table({"text": rows}), tmp_path / "lines.parquet")
    found = read(tmp_path / "lines.parquet", documents="articles")[0]
    assert found == [story.replace("\n\n", "\n") for story in STORIES]


ONCE = f"{MARKER} occurs once and is read as text; with --documents records it separates documents"


@pytest.mark.parametrize("line", [MARKER, f"b{MARKER}", f"a{MARKER}b", "</s>"])
@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_a_marker_that_occurs_once_joins_no_lines(tmp_path, line, suffix):
    def write(lines):
        if suffix == ".txt":
            (tmp_path / f"a{suffix}").write_text("\n".join(lines))
        else:
            pq.write_table(pa.table({"text": lines}), tmp_path / f"a{suffix}")

    marker = "</s>" if line == "</s>" else MARKER
    write(["one", "two", line, "three", "four"])
    found, reading = read(tmp_path / f"a{suffix}")
    assert found == ["one", "two", line, "three", "four"]
    assert list(reading.notes) == [ONCE.replace(MARKER, marker)]
    found, reading = read(tmp_path / f"a{suffix}", documents="records")
    assert [found[0].split("\n")[0], found[-1].split("\n")[-1], len(found)] == ["one", "four", 2]
    assert list(reading.notes) == [f"{marker} separates documents"]
    write(["one", "two", line, "three", line, "four"])
    assert len(read(tmp_path / f"a{suffix}")[0]) == 3


def test_markers_that_occur_once_in_each_file_of_a_source_separate_documents(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"{STORIES[number]}\n{MARKER}\n")
    found, reading = read(tmp_path)
    assert (found, list(reading.notes)) == (STORIES[:2], [f"{MARKER} separates documents"])


@pytest.mark.parametrize("block", [17, 64, 1 << 16])
def test_markers_in_a_long_line_are_counted_once_each(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    first, second, third = (f"{n} is a text that has no line end, é, and is longer than a block of the file. " * 40
                            for n in ("One", "Two", "Three"))  # fmt: skip
    path = tmp_path / "a.txt"
    path.write_text(f"{first.strip()}{MARKER}{second}")
    found, reading = read(path)
    assert (len(found), list(reading.notes)) == (1, [ONCE])
    path.write_text(f"{first.strip()}{MARKER}{second.strip()}{MARKER}{third}")
    assert read(path)[0] == [first.strip(), second.strip(), third.strip()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_marker_inside_a_sentence_parts_no_record(tmp_path, name):
    texts = [
        f"A story.\n{MARKER}\nAnother story.",
        f"The token {MARKER} ends a text.\nIt is {MARKER}.",
        f'Write "{MARKER}"\nor `{MARKER}`.',
        f"It names {MARKER} too.\nThen comes\n  {MARKER}\nand the rest.",
        f'"So it ends."{MARKER}"Really?" he asked.{MARKER}{MARKER}(Yes.)\nThe end. {MARKER}',
    ]
    found, reading = read(written(tmp_path / name, texts))
    assert found == [
        "A story.", "Another story.", *texts[1:3], f"It names {MARKER} too.\nThen comes", "and the rest.",
        '"So it ends."', '"Really?" he asked.', "(Yes.)\nThe end."
    ]  # fmt: skip
    assert list(reading.notes)[1:] == [
        f"{MARKER} inside a sentence is text; with --separator '{MARKER}' it separates there too"
    ]
    assert MARKER not in "".join(read(tmp_path / name, separator=MARKER)[0])


def test_a_marker_that_is_no_special_one_parts_a_record_only_as_a_record(tmp_path):
    texts = ["one", "two", "</s>", "HTML\n</s>\nin lines", "</s>", "three"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["one\ntwo", "HTML\n</s>\nin lines", "three"]
