"""Instructions as public files have them: other names for the three texts, fields beside them, conversations."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from indraquantum.config import PrepareSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.inspect import describe
from indraquantum.data.instructions import AlpacaSample, alpaca_samples
from indraquantum.data.prepare import prepare
from indraquantum.data.records import Reading
from indraquantum.errors import UserError
from indraquantum.monitor.summaries import prepare_summary
from tiny_tokenizer import save_tiny_tokenizer

PLAIN = [AlpacaSample(f"Do {n}", "" if n % 2 else f"with {n}", f"Done {n}") for n in range(6)]


def read_alpaca(field, name, **options):
    return list(alpaca_samples(field, name, **options))


def read(path, items, **options):
    """Write `items` to `path` and read them; the samples, and what came up."""
    reading = Reading("--instructions", skip=options.pop("skip", False))
    path.write_text(items if isinstance(items, str) else json.dumps(items), encoding="utf-8")
    return read_alpaca("--instructions", str(path), reading=reading, **options), reading


def objects(instruction, given, output, **more):
    return [
        {instruction: sample.instruction, given: sample.input, output: sample.output} | more for sample in PLAIN
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),  # Dolly
        ("prompt", "input", "completion"),
        ("question", "context", "answer"),
    ],
)
def test_other_names_for_the_three_texts_are_used_and_told(tmp_path, names):
    found, reading = read(tmp_path / "a.json", objects(*names, category="open_qa"))
    assert found == PLAIN
    assert reading.unused_fields == {"category": 6}
    told = [f"6 samples have their {role} in {name!r}" for role, name in zip(PLAIN[0]._fields, names, strict=True)]
    told[1] = told[1].replace("6", "3")  # only those that have any
    expected = [line for line, plain, name in zip(told, PLAIN[0]._fields, names, strict=True) if plain != name]
    assert list(reading.notes) == expected
    columns = {name: [item[name] for item in objects(*names)] for name in names}
    pq.write_table(pa.table({name: pa.array(values, pa.string_view()) for name, values in columns.items()}),
                   tmp_path / "a.parquet")  # fmt: skip
    assert read_alpaca("-", str(tmp_path / "a.parquet")) == PLAIN


def test_an_input_and_a_context_are_not_both_used_and_the_other_is_told(tmp_path):
    items = [{"instruction": "a", "input": "in", "context": "con", "output": "c"},
             {"instruction": "b", "input": "", "context": "con", "output": "c"},
             {"instruction": "d", "input": None, "context": None, "output": "c", "response": "other"}]  # fmt: skip
    found, reading = read(tmp_path / "a.json", items)
    assert [sample.input for sample in found] == ["in", "con", ""]
    assert reading.unused_fields == {"context": 1, "response": 1}


def test_fields_that_are_not_used_are_counted_in_summary_and_manifest(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    items = [
        {"instruction": f"Do {n}", "input": "", "output": "c", "id": "same", "system": "Be terse." if n < 7 else "",
         "history": [["a", "b"]] if n < 3 else [], "text": f"Below is an instruction: Do {n} c"}
        for n in range(12)
    ]  # fmt: skip
    items[0] |= {"text": "something of its own", "score": 0}
    (tmp_path / "factory.json").write_text(json.dumps(items))
    report = prepare(
        PrepareSettings(wikitext_samples=0, alpaca_samples=0, instructions=(str(tmp_path / "factory.json"),),
                        tokenizer=str(tmp_path / "tokenizer"), output=tmp_path / "out" / "m.pkl")
    )  # fmt: skip
    said = prepare_summary(report).splitlines()
    for name, count in (("system", 7), ("history", 3)):
        assert f"note: factory: {count} samples have a field {name!r}, which is not used" in said
    for name in ("text", "score"):
        assert f"note: factory: 1 sample has a field {name!r}, which is not used" in said
    assert "note: factory: these fields are not used: id" in said
    assert "factory: unused fields: id 12, system 7, history 3, text 1, score 1" in describe(report.folder)
    (source,) = open_dataset("--data", report.folder, verify=True).manifest["sources"]
    assert source["unused_fields"] == {"id": 12, "system": 7, "history": 3, "text": 1, "score": 1}
    assert source["documents"] == 12, "a repeated id is no key"


ITEMS = objects("instruction", "input", "output")
LINES = "\n".join(map(json.dumps, ITEMS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("b.json", "\ufeff\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.jsonl", json.dumps(ITEMS)),
        ("b.jsonl", "\n" + json.dumps(ITEMS, indent=1)),
        ("c.json", "\n".join(json.dumps(item, indent=2) for item in ITEMS)),
        ("c.jsonl", LINES + "\n"),
        ("d.json", json.dumps(ITEMS)),
    ],
)
def test_a_list_and_an_object_a_line_are_read_whatever_the_ending(tmp_path, name, content):
    assert read(tmp_path / name, content)[0] == PLAIN


def test_a_wrong_line_of_a_json_file_is_named_or_skipped(tmp_path):
    content = LINES.replace('"Do 2"', "Do 2")
    with pytest.raises(UserError, match=r"must be JSON; .* \(line 3\)"):
        read(tmp_path / "a.json", content)
    found, reading = read(tmp_path / "a.json", content, skip=True)
    assert (len(found), len(reading.skipped)) == (5, 1)


def test_inputs_that_say_there_is_none_are_counted_and_by_option_emptied(tmp_path):
    inputs = ["<noinput>", "Noinput", "No input.", "no_input", "None of these", "there is no input here", ""]
    items = [{"instruction": f"Do {n}", "input": given, "output": "b"} for n, given in enumerate(inputs)]
    found, reading = read(tmp_path / "a.json", items)
    assert [sample.input for sample in found] == inputs
    assert "4 samples have an input that says there is none" in next(iter(reading.notes))
    found, reading = read(tmp_path / "a.json", items, empty_noinput=True)
    assert [sample.input for sample in found] == ["", "", "", "", *inputs[4:]]
    assert next(iter(reading.notes)).endswith("emptied")


def test_instances_share_their_instruction(tmp_path):
    items = [{"id": "seed_0", "instruction": "Add", "instances": [{"input": "1 2", "output": "3"},
                                                                   {"input": "", "output": "0"}]}]  # fmt: skip
    found, reading = read(tmp_path / "seed.jsonl", items)
    assert found == [AlpacaSample("Add", "1 2", "3"), AlpacaSample("Add", "", "0")]
    assert reading.unused_fields == {"id": 2}


CHATS = {
    "messages": [("role", "content"), ("user", "assistant")],
    "conversations": [("from", "value"), ("human", "gpt")],
}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_conversations_of_a_single_turn_are_read_by_option(tmp_path, kind, suffix):
    (who, what), (user, answerer) = CHATS[kind]

    def talk(*texts, system=None):
        turns = [{who: (user, answerer)[n % 2], what: text} for n, text in enumerate(texts)]
        return {kind: ([{who: "system", what: system}] if system else []) + turns, "id": 3}

    items = [talk("Hello?", "Hi."), talk("a", "b", "c", "d"), talk("Two?", "2", system="Be terse."), talk("alone")]
    path = tmp_path / f"chat{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(items))
    else:
        pq.write_table(pa.Table.from_pylist(items), path)
    with pytest.raises(UserError, match=f"item 1 is a conversation .'{kind}'.; --conversations single"):
        read_alpaca("--instructions", str(path))
    reading = Reading("--instructions")
    found = read_alpaca("--instructions", str(path), reading=reading, conversations="single")
    assert found == [AlpacaSample("Hello?", "", "Hi."), AlpacaSample("Two?", "", "2")]
    assert reading.left_out == {"conversations of more or less than one question and one answer": 2}
    assert reading.unused_fields == {"id": 2, "system message": 1}


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ("Hello", "message 1 must be an object"),
        ({"role": "user"}, "'content'"),
        ({"role": "user", "content": []}, "a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part of the type 'image_url'"),
        ({"role": "user", "content": ["Hello"]}, "a part without a type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "must have a text field 'text'; it is a number"),
    ],
)
def test_messages_of_another_shape_are_refused(tmp_path, message, word):
    with pytest.raises(UserError, match=word):
        read(
            tmp_path / "a.json",
            [{"messages": [message, {"role": "assistant", "content": "b"}]}],
            conversations="single",
        )


def test_text_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " this?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "That."}]
    found, _ = read(tmp_path / "a.json", [{"messages": messages}], conversations="single")
    assert found == [AlpacaSample("What is this?", "", "That.")]


def test_messages_of_both_forms_with_null_in_one_are_read(tmp_path):
    messages = [
        {"role": None, "content": None, "from": "human", "value": "Hello?"},
        {"role": "assistant", "content": "Hi.", "from": None, "value": None},
    ]
    assert read(tmp_path / "a.json", [{"messages": messages}], conversations="single")[0] == [
        AlpacaSample("Hello?", "", "Hi.")
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "kind", [pa.timestamp("ns"), pa.timestamp("us"), pa.duration("ns"), pa.time64("ns"), pa.timestamp("s"), pa.date64()]
)
def test_dates_and_times_are_unused_whatever_python_can_hold(tmp_path, kind, suffix):
    """A nanosecond more than a microsecond, and a year that Python does not know."""
    values = [1, None, 86_400_000 * (10**7 if kind in (pa.timestamp("s"), pa.date64()) else 1)]
    times = pa.array(values, pa.int64()).cast(kind, safe=False)
    texts = {name: pa.array(list("abc")) for name in ("instruction", "output")}
    table = pa.table({**texts, "when": times})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    reading = Reading("--instructions")
    found = list(alpaca_samples("--instructions", str(path), reading=reading))
    assert [sample.output for sample in found] == ["a", "b", "c"]
    assert reading.unused_fields == {"when": 2}


def test_a_date_that_python_cannot_hold_inside_a_list_is_one_line(tmp_path):
    far = pa.array([[10**15]], pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("s")))
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"], "when": far}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^--instructions: got \S+; must have dates .*; remove the column when$"):
        read_alpaca("--instructions", str(tmp_path / "a.parquet"))
    twice = pa.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"^--instructions: got \S+; must have one column 'output', not 2$"):
        read_alpaca("--instructions", str(tmp_path / "b.parquet"))


def test_fields_beside_a_conversation_are_told_once_as_unused(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    _, reading = read(tmp_path / "a.json", [talk | {"prompt": "a", "context": "c"}], conversations="single")
    assert (reading.unused_fields, reading.notes) == ({"prompt": 1, "context": 1}, {})


def test_where_all_is_left_out_the_error_says_what(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}] * 3}
    with pytest.raises(
        UserError, match="at least one instruction; left out 2 conversations of more or less than one question"
    ):
        read(tmp_path / "a.json", [talk, talk], conversations="single")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_objects_of_several_lines_and_a_wrong_first_line(tmp_path, name):
    pretty = "\n".join(json.dumps(item, indent=1) for item in objects("instruction", "input", "output"))
    assert read(tmp_path / name, pretty)[0] == PLAIN
    found, reading = read(tmp_path / name, "{bad\n" + LINES, skip=True)
    assert (found, len(reading.skipped)) == (PLAIN, 1)


def test_names_that_are_no_utf_8_are_shown_with_escapes(tmp_path):
    items = [item | {"odd\ud800": 1, "two\nlines": 1} for item in objects("instruction", "input", "output")]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / os.fsdecode(b"a-train\xff.json")).write_text(json.dumps([*items, {"instruction": "alone"}]))
    (folder / os.fsdecode(b"notes\xff.md")).write_text("x")
    settings = PrepareSettings(
        wikitext_samples=0, alpaca_samples=0, instructions=(str(folder),), skip_bad=True,
        tokenizer=str(save_tiny_tokenizer(tmp_path / "tokenizer")), output=tmp_path / "d.pkl",
    )  # fmt: skip
    summary = prepare_summary(prepare(settings))
    assert "6 samples have a field 'odd\\ud800', which is not used" in summary
    assert "left out notes\\udcff.md" in summary
    assert "skipped: 1 wrong record, listed" in summary
    assert json.loads((tmp_path / "d/skipped.jsonl").read_text())["file"].endswith("a-train\\udcff.json")
    assert "two\\nlines 6" in describe(tmp_path / "d")


def test_many_unused_fields_are_told_in_a_few_lines(tmp_path):
    items = [item | {f"{n}-{k}": 1 for k in range(3)} for n, item in enumerate(objects("question", "input", "answer"))]
    (tmp_path / "a.json").write_text(json.dumps(items))
    settings = PrepareSettings(
        wikitext_samples=0, alpaca_samples=0, instructions=(str(tmp_path / "a.json"),),
        tokenizer=str(save_tiny_tokenizer(tmp_path / "tokenizer")), output=tmp_path / "d.pkl",
    )  # fmt: skip
    summary = prepare_summary(prepare(settings))
    assert summary.count("1 sample has a field") == 10
    assert "8 more fields are not used; manifest.json lists them" in summary


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
OF_TOOLS = {
    "null and calls": [("user", "Rain?", {}), ("assistant", None, {"tool_calls": [CALL]})],
    "nothing and calls": [("user", "Rain?", {}), ("assistant", "", {"tool_calls": [CALL]})],
    "words and calls": [("user", "Rain?", {}), ("assistant", "Let me look.", {"tool_calls": [CALL]})],
    "an older call": [("user", "Rain?", {}), ("assistant", None, {"function_call": {"name": "weather"}})],
    "its answer": [("user", "Rain?", {}), ("assistant", None, {"tool_calls": [CALL]}), ("tool", "Yes", {}),
                   ("assistant", "It rains.", {})],
    "ShareGPT's": [("human", "Rain?", {}), ("function_call", "{}", {}), ("observation", "Yes", {}),
                   ("gpt", "Yes.", {})],
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_TOOLS)
def test_conversations_with_tools_are_left_out_and_counted(tmp_path, kind):
    who, what = ("from", "value") if kind == "ShareGPT's" else ("role", "content")
    talk = {"messages": [{who: role, what: text} | more for role, text, more in OF_TOOLS[kind]]}
    plain = {"messages": [{"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b", "tool_calls": None, "function_call": {}}]}  # fmt: skip
    found, reading = read(tmp_path / "a.json", [talk, plain, talk], conversations="single")
    assert found == [AlpacaSample("a", "", "b")]
    assert reading.left_out == {"conversations with calls of tools": 2}
    assert not reading.unused_fields
    assert not reading.skipped


def test_fields_of_messages_that_are_not_used_are_counted_once_a_sample(tmp_path):
    messages = [
        {"role": "user", "content": "a", "name": "Ann", "weight": None},
        {"role": "assistant", "content": "b", "name": "Bot", "reasoning_content": "I think."},
    ]
    _, reading = read(tmp_path / "a.json", [{"messages": messages, "name": "x"}] * 3, conversations="single")
    assert list(reading.unused_fields.items()) == [("name", 3), ("messages.name", 3), ("messages.reasoning_content", 3)]


def test_null_under_one_name_hides_no_text_under_another(tmp_path):
    """As in tables that were merged: every row has all columns."""
    of_names = {"instruction": None, "output": None, "prompt": "p", "response": "r", "messages": None}
    of_plain = {"instruction": "i", "output": "o", "prompt": None, "response": None, "messages": None}
    of_talk = {"instruction": None, "output": None, "prompt": None, "response": None,
               "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    rows = [of_names, of_plain, of_talk]
    expected = [AlpacaSample("p", "", "r"), AlpacaSample("i", "", "o"), AlpacaSample("q", "", "a")]
    found, reading = read(tmp_path / "a.json", rows, conversations="single")
    assert found == expected
    told = [
        f"1 sample has their {role} in {name!r}" for role, name in (("instruction", "prompt"), ("output", "response"))
    ]
    assert list(reading.notes) == told
    assert not reading.unused_fields
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_alpaca("-", str(tmp_path / "a.parquet"), conversations="single") == expected
    instances = [{"input": "", "output": "x"}]
    assert read(tmp_path / "a.json", [{"instruction": "i", "output": None, "instances": instances}])[0] == [
        AlpacaSample("i", "", "x")
    ]
    for null in ({"instruction": None, "prompt": None, "output": "o"}, {"instruction": "i", "output": None}):
        with pytest.raises(UserError, match=r"must have a text field '(instruction|output)' \(or .*\); '\w+' is null"):
            read(tmp_path / "a.json", [null])
