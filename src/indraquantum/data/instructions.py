"""Reads instructions: Stanford Alpaca's objects, and public files that name the same three texts differently.

No field is dropped silently. Further fields of a sample are counted, and the summary and the manifest list them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from indraquantum.data.download import download_url
from indraquantum.data.records import (
    JSON_SUFFIXES,
    NOTHING,
    TABLE_SUFFIXES,
    Reading,
    check_text_column,
    json_records,
    kind_of,
    samples_have,
    source_files,
    table_rows,
    wrong_text,
)
from indraquantum.errors import UserError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
REMEDY = "give a .json, .jsonl, .parquet or .arrow file, or a folder of them"
# The names of a sample's three texts in public files. The first one that is not null in a sample is used.
NAMES = {
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
}
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
MESSAGE_FIELDS = ("role", "from", "content", "value")  # in OpenAI's form role and content, in ShareGPT's the others
# A message of a program that the assistant calls, and the fields in which the assistant calls it.
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation")
CALLS = ("tool_calls", "function_call")
# Fields that describe a sample and are no part of it.
ABOUT = frozenset(
    [
        "id",
        "idx",
        "index",
        "uid",
        "uuid",
        "source",
        "category",
        "dataset",
        "url",
        "license",
        "lang",
        "language",
        "name",
        "is_classification",
        "model",
    ]
)
NO_INPUT = re.compile(r"<?\s*no[\s_-]*input\s*>?\.?", re.IGNORECASE)


class AlpacaSample(NamedTuple):
    """One instruction with its answer."""

    instruction: str
    input: str  # empty where the instruction needs none
    output: str


def local_instructions(field: str, name: str) -> str:
    """Return a local file: a URL is downloaded, a path is returned unchanged."""
    remote = name.startswith(("http://", "https://"))
    return str(download_url(field, name, f"{REMEDY} with {field} PATH")) if remote else name


def alpaca_samples(
    field: str, name: str, *, reading: Reading | None = None, conversations: str = "refuse", empty_noinput: bool = False
) -> Iterator[AlpacaSample]:
    """Yield instructions: objects with the texts `instruction`, `output` and optionally `input`, or other NAMES.

    Args:
        field: The option to name in an error.
        name: A .json list, a .jsonl file with one object a line, or a table (.parquet, .arrow) with those columns; a
            folder or a glob of them; a folder that datasets' `save_to_disk` wrote; or the URL of a file.
        reading: What to do with wrong items, which are refused by default. If they are skipped, so are items with an
            empty output; otherwise those are kept, because the published file has some. It collects what is not used.
        conversations: Refuse lists of messages, or use those of a single turn.
        empty_noinput: Treat an input that says that there is none (`<noinput>`) as empty.

    Raises:
        UserError: the source is missing, empty, not UTF-8 or of another form (the message names the first wrong item),
            or there is no network.
    """
    reading = reading or Reading(field)
    files = source_files(field, local_instructions(field, name), SUFFIXES, f"{REMEDY} with {field} PATH", reading)
    renamed: Counter[tuple[str, str]] = Counter()
    inputs_none = samples = without_output = 0
    for path in files:
        for number, item in enumerate(_items(field, path, reading), start=1):
            for record in _instances(item):
                sample = _sample(number, record, reading, conversations)
                if isinstance(sample, str):
                    reading.add(path, sample)
                    continue
                if sample is None:
                    continue
                if _conversation(record) is None:
                    renamed.update(_renamed(record))
                if NO_INPUT.fullmatch(sample.input.strip()):
                    inputs_none += 1
                    sample = sample._replace(input="") if empty_noinput else sample
                samples += 1
                without_output += not sample.output.strip()
                yield sample
    for (role, found), count in renamed.items():
        reading.note(f"{samples_have(count)} their {role} in {found!r}")
    if inputs_none:
        done = "it was emptied" if empty_noinput else "it was kept; --empty-noinput empties it"
        reading.note(f"{samples_have(inputs_none)} an input that says there is none, such as <noinput>: {done}")
    if without_output:
        reading.note(f"{samples_have(without_output)} an empty output: they were kept; --skip-bad leaves them out")
    if not samples:
        raise reading.nothing(name, "instruction")


def _items(field: str, path: Path, reading: Reading) -> Iterator[Any]:
    if path.suffix in JSON_SUFFIXES:
        return json_records(field, path, reading)

    def all_columns(schema: pyarrow.Schema) -> list[str]:
        names = schema.names
        if not set(names) & {*CONVERSATIONS, "instances"}:
            for role in ("instruction", "output"):
                if not set(NAMES[role]) & set(names):
                    allowed = f"must have a column {_or_other_names(role)}; it has {', '.join(names)}"
                    raise UserError(field, path, allowed)
        for name in dict.fromkeys(name for role in NAMES.values() for name in role if name in names):
            if names.count(name) == 1:
                check_text_column(field, path, schema, name)
        return list(dict.fromkeys(names))

    return table_rows(field, path, all_columns)


def _instances(item: Any) -> list[Any]:
    """Return the samples of an item: one, or several in self-instruct's `instances`, which share an instruction."""
    if not isinstance(item, dict) or not isinstance(item.get("instances"), list) or item.get("output") is not None:
        return [item]
    shared = {key: value for key, value in item.items() if key != "instances"}
    return [shared | instance if isinstance(instance, dict) else instance for instance in item["instances"]] or [item]


def _sample(number: int, item: Any, reading: Reading, conversations: str) -> AlpacaSample | str | None:
    """Return an item's sample, what is wrong with it, or None if it is left out; count what is not used."""
    if not isinstance(item, dict):
        return f"item {number} must be an object with instruction and output; {kind_of(item)}"
    talk = _conversation(item)
    if talk and conversations == "refuse":
        return f"item {number} is a conversation ({talk!r}); --conversations single uses those of a single turn"
    texts = _of_conversation(number, item[talk], reading) if talk else _of_fields(number, item)
    if not isinstance(texts, AlpacaSample):
        return texts
    if reading.skip and not texts.output.strip():
        return f"item {number} has an empty output"
    reading.unused_fields.update(_unused_fields(item, talk, texts))
    return texts


def _of_conversation(number: int, messages: list[Any], reading: Reading) -> AlpacaSample | str | None:
    """Return the sample of a conversation, what is wrong with it, or None if it is left out."""
    if any(map(_is_of_tool, messages)):
        reading.left_out["conversations with calls of tools"] += 1
        return None
    turns = _turns(messages)
    if isinstance(turns, str):
        return f"item {number}: {turns}"
    texts = _single_turn(turns)
    if texts is None:
        reading.left_out["conversations of more or less than one question and one answer"] += 1
    elif any(role == "system" and text.strip() for role, text in turns):
        reading.unused_fields["system message"] += 1
    return texts


def _of_fields(number: int, item: dict[str, Any]) -> AlpacaSample | str:
    """Return the sample of an item that has its texts in fields, or what is wrong with it."""
    named = {role: _found(item, role) for role in NAMES}
    for role, name in named.items():
        if name is not None and (reason := wrong_text(item[name])):
            return f"item {number} must have a text field {name!r}; {reason}"
        if name is None and role != "input":
            told = f"it has {', '.join(map(repr, list(item)[:8]))}" if item else "it is empty"
            empty = next((there for there in NAMES[role] if there in item), None)
            reason = f"it is missing ({told})" if empty is None else f"{empty!r} is null"
            return f"item {number} must have a text field {_or_other_names(role)}; {reason}"
    return AlpacaSample(*(item[name] if name else "" for name in named.values()))


def _unused_fields(item: dict[str, Any], talk: str | None, texts: AlpacaSample) -> list[str]:
    """Return the fields of an item, and of its messages, that have a value and are not used."""
    used = {talk} if talk else {_found(item, role) for role in NAMES}
    unused = []
    for name, value in item.items():
        is_whole_prompt = name == "text" and isinstance(value, str) and texts.instruction in value
        if name not in used and value not in NOTHING and not is_whole_prompt:
            unused.append(name)
    for message in item[talk] if talk else ():
        beside = (name for name, value in message.items() if name not in MESSAGE_FIELDS and value not in NOTHING)
        unused += [f"{talk}.{name}" for name in beside]
    return list(dict.fromkeys(unused))


def _conversation(item: dict[str, Any]) -> str | None:
    """Return the name of an item's list of messages; None if it has instruction and output of its own."""
    if None not in (_found(item, "instruction"), _found(item, "output")):
        return None
    return next((name for name in CONVERSATIONS if isinstance(item.get(name), list)), None)


def _found(item: dict[str, Any], role: str) -> str | None:
    """Return the first name under which an item has the text of a role and not null; an input is not empty either."""
    nothing = (None, "") if role == "input" else (None,)
    return next((name for name in NAMES[role] if item.get(name) not in nothing), None)


def _renamed(item: dict[str, Any]) -> list[tuple[str, str]]:
    return [(role, found) for role in NAMES if (found := _found(item, role)) is not None and found != role]


def _or_other_names(role: str) -> str:
    first, *others = NAMES[role]
    return f"{first!r} (or {', '.join(others)})"


def _is_of_tool(message: Any) -> bool:
    """Return whether a message calls a tool or comes from one; its text, if any, answers nobody."""
    if not isinstance(message, dict):
        return False
    speakers = (message.get("role"), message.get("from"))
    return any(speaker in TOOL_ROLES for speaker in speakers) or any(message.get(c) not in NOTHING for c in CALLS)


def _turns(messages: list[Any]) -> list[tuple[str, str]] | str:
    """Return a conversation in OpenAI's or ShareGPT's form as (role, text), or what is wrong with it."""
    turns = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {place} must be an object with role and content, or from and value; {kind_of(message)}"
        # A table of both forms has all four names in every message, two of them with null.
        role, text = (
            next((message[name] for name in names if message.get(name) is not None), None)
            for names in (("role", "from"), ("content", "value"))
        )
        text, reason = _joined_parts(text) if isinstance(text, list) and text else (text, wrong_text(text))
        if reason:
            return f"message {place} must have a text field 'content' or 'value'; {reason}"
        turns.append((ROLES.get(str(role).lower(), str(role)), text))
    return turns


def _joined_parts(parts: list[Any]) -> tuple[str, str | None]:
    """Return the text of a message in parts, as OpenAI writes them, and what is wrong with it, or None."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            named = f"of the type {kind!r}" if kind is not None else "without a type"
            return "", f"it has a part {named}, and only parts of the type 'text' can be read"
        if reason := wrong_text(part.get("text")):
            return "", f"a part of the type 'text' must have a text field 'text'; {reason}"
        texts.append(part["text"])
    joined = "".join(texts)
    return joined, wrong_text(joined)


def _single_turn(turns: list[tuple[str, str]]) -> AlpacaSample | None:
    """Return the one question with its answer; None if there are more of them, or other roles."""
    spoken = [(role, text) for role, text in turns if role != "system"]
    if [role for role, _ in spoken] != ["user", "assistant"]:
        return None
    return AlpacaSample(spoken[0][1], "", spoken[1][1])
