"""Writes the page of all options from the command line itself: names, defaults, allowed values and help texts.

    python docs/tools/options_page.py > options.md

A command's options are the fields of its settings class in config.py. The page groups them by the class that declares
them. A new field appears on the page without any change here.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

from cyclopts import App
from pydantic.fields import FieldInfo

from indraquantum.cli import app
from indraquantum.config import Settings

KINDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: "switch"}
OPENING = """# Every option

The program writes this page when the site is built. `indra COMMAND --help` prints the same texts.

Every command also takes `--options FILE.yaml`, a file of options; [Formats](FORMATS.md) describes it. An option that
you type wins over the file.
"""


def page(root: App = app) -> str:
    """The whole page as Markdown."""
    return "\n".join([OPENING, *(part for names, command in commands(root) for part in section(names, command))])


def commands(root: App, names: tuple[str, ...] = ()) -> Iterator[tuple[str, App]]:
    """Every command with its full name, in the order in which cli.py declares them."""
    for name in root:
        if name.startswith("-"):
            continue
        path = (*names, name)
        if root[name].default_command is not None:
            yield " ".join(path), root[name]
        yield from commands(root[name], path)


def section(name: str, command: App) -> Iterator[str]:
    """The section of a command: what it does, its arguments, and its options by group."""
    function = command.default_command
    yield f"## indra {name}\n"
    yield f"{escaped(first_sentence(function.__doc__))}\n"
    settings = settings_of(function)
    for argument in command.assemble_argument_collection(parse_docstring=True):
        if argument.name == "*" or argument.keys:  # the settings and their fields, which follow by group
            continue
        default = argument.field_info.default
        kind = "required" if default is argument.field_info.empty else said_default(default)
        yield entry(name, argument.name, kind, escaped(argument.parameter.help or ""))
    if settings is None:
        return
    inherited = command_with(settings.__mro__[1])
    groups = [group for group in groups_of(settings) if not (inherited and issubclass(settings.__mro__[1], group[0]))]
    for group, fields in groups:
        if group is not settings:
            title = first_sentence(group.__doc__).rstrip(".")
            yield f"### {name}: {escaped(title[0].lower() + title[1:])}\n"
        for field, info in fields.items():
            text = escaped(" ".join((info.description or "").split()))
            text = text.replace("docs/FORMATS.md", "[Formats](FORMATS.md)")
            yield entry(name, "--" + field.strip("_").replace("_", "-"), allowed(info), text)

    if inherited:
        yield f"And every option of [indra {inherited}](#indra-{inherited}).\n"


def command_with(settings: type) -> str | None:
    """The command whose settings class this is. A command whose settings build on it takes all of its options too."""
    return next((name for name, command in commands(app) if settings_of(command.default_command) is settings), None)


def settings_of(function: Any) -> type[Settings] | None:
    """The settings class that a command takes, if any."""
    hint = typing.get_type_hints(function).get("settings")
    return hint if isinstance(hint, type) and issubclass(hint, Settings) else None


def groups_of(settings: type[Settings]) -> list[tuple[type[Settings], dict[str, FieldInfo]]]:
    """The fields, grouped by the class that declares them first. The groups follow the order of the classes' MRO."""
    declared: dict[type[Settings], dict[str, FieldInfo]] = {}
    for field, info in settings.model_fields.items():
        classes = [base for base in settings.__mro__ if field in inspect.get_annotations(base)]
        declared.setdefault(classes[-1], {})[field] = info
    ordered = [base for base in settings.__mro__ if base in declared]
    return [(base, declared[base]) for base in ordered]


def entry(command: str, label: str, kind: str, text: str) -> str:
    """One option as a term with its explanation; the anchor is `command-option`."""
    anchor = f"{command.replace(' ', '-')}-{label.strip('-').lower()}"
    return f"`{label}`{f' <small>{kind}</small>' if kind else ''} {{ #{anchor} }}\n:   {text}\n"


def allowed(info: FieldInfo) -> str:
    """The kind of value that an option takes, and its default."""
    kind = kind_of(info.annotation)
    return kind if info.annotation is bool else f"{kind}; {said_default(info.default)}"


def said_default(value: object) -> str:
    """A default in words."""
    return "optional" if value is None else f"default <code>{escaped(str(value))}</code>"


def kind_of(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(kind_of(part) for part in arguments if part is not NoneType)
    if origin is Literal:
        return " | ".join(f"<code>{value}</code>" for value in arguments)
    if origin is tuple:
        return f"{kind_of(arguments[0])}, may be repeated"
    return KINDS[hint]


def first_sentence(text: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def escaped(text: str) -> str:
    """Plain text as Markdown that shows it as it is. Text in backticks is code already and does not change."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\<>*_{}\[\]|$])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    print(page())
