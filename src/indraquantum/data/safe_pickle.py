"""Reads a pickle without running anything in it.

A pickle is a small program. It is dangerous because it may name any importable object and call it. Here no name is ever
looked up, so nothing can be called. What is left can build only plain containers, numbers and strings. Scanners such as
picklescan search for known dangerous names instead, which proves less.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from indraquantum.errors import UserError
from indraquantum.files import unreadable

ALLOWED = "must be a pickle of plain containers and numbers"
# The errors that broken or hostile bytes may raise. pickle's documentation names some, and fuzzing found the others.
BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that refuses every name and every outside reference."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside itself")


def load_plain_pickle(field: str, path: Path) -> Any:
    """Read the pickle at `path`. Nothing in it is executed or imported.

    Args:
        field: The option to name in an error.
        path: The file.

    Returns:
        Nested containers, numbers, strings, bytes, booleans and None. The caller checks their form.

    Raises:
        UserError: the file can't be read, is not a complete pickle, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except OSError as error:
        raise unreadable(field, path, error) from None
    except BROKEN as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(field, path, f"{ALLOWED} ({reason})") from None
