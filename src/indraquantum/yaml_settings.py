"""Reads settings from YAML files. A key must not be given twice, and each error is one line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from indraquantum.errors import UserError, refused_setting
from indraquantum.files import unreadable

Checked = TypeVar("Checked")
MERGE = "tag:yaml.org,2002:merge"  # `<<: *anchor`
# Characters of a file. Anchors that hold aliases of others can double its content with each line. Whoever reads or
# prints the content meets each alias as a copy, so each one counts as a copy.
MOST_CHARACTERS = 1 << 18


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key given twice; PyYAML's own silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        for key in keys:
            if isinstance(key, Hashable) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def with_numbers(content: Any, texts: frozenset[str]) -> Any:
    """Return what a YAML file holds, with numbers for text such as 2e-3, which PyYAML's version of YAML takes for text.

    Args:
        content: values, lists and mappings.
        texts: the keys whose values are texts.
    """
    if isinstance(content, dict):
        return {key: value if key in texts else with_numbers(value, texts) for key, value in content.items()}
    if isinstance(content, list):
        return [with_numbers(value, texts) for value in content]
    return float(content) if isinstance(content, str) and EXPONENT.match(content) else content


def read_yaml(field: str, path: Path, holds: str) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping.

    Args:
        field: the option or argument to name in an error.
        path: the file.
        holds: what the mapping must hold, for the message.

    Raises:
        UserError: the file can't be read, is too large, is not YAML, or is not a mapping.
    """
    try:
        if path.stat().st_size > 4 * MOST_CHARACTERS:  # in UTF-8
            raise UserError(field, path, f"must be at most {MOST_CHARACTERS:,} characters long")
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if _characters(node, {}) > MOST_CHARACTERS:
            allowed = (
                f"must be at most {MOST_CHARACTERS:,} characters long, where each alias counts as a copy of its anchor"
            )
            raise UserError(field, path, allowed)
        content = None if node is None else loader.construct_document(node)
    except UserError:  # which is a ValueError
        raise
    except OSError as error:
        raise unreadable(field, path, error) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # no UTF-8, no such date, too many digits or brackets
        raise UserError(field, path, f"must be YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(field, path, f"must hold {holds}")
    return content


def _characters(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Count the characters of `node` and its content, plus one for the node; `known` has those counted before.

    Raises:
        yaml.YAMLError: a node contains itself.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value if node else "")
    if id(node) not in known:
        known[id(node)] = 0  # until it is counted
        parts = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_characters(part, known) for part in parts)
    elif known[id(node)] == 0:
        raise yaml.YAMLError("an anchor contains itself")
    return known[id(node)]


def checked(make: Callable[[], Checked], where: str) -> Checked:
    """Return what `make` returns. If pydantic refuses a value, the first one becomes one line.

    Raises:
        UserError: a value is refused; the message names the field below `where`, the value and what is allowed.
    """
    try:
        return make()
    except ValidationError as error:
        raise refused_setting(error, where) from None
    except UserError as error:
        raise UserError(f"{where}{error.field}", error.value, error.allowed) from None
