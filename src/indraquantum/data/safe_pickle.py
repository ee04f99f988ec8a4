"""Reading a pickle without running anything in it.

A pickle is a small program; what makes it dangerous is that it may name any importable object and call it. Here no
name is ever looked up, so nothing can be called: what is left can build plain containers, numbers and strings.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from indraquantum.errors import UserError

ALLOWED = "must be a pickle of plain containers and numbers"
# What unpickling broken or hostile bytes may raise: pickle's documentation names some of these, fuzzing found others.
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
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside itself")


def load_plain_pickle(field: str, path: Path) -> Any:
    """Read the pickle at `path`; nothing in it is executed or imported.

    Args:
        field: The option to name in an error.
        path: The file.

    Returns:
        Containers, numbers, strings, bytes, booleans and None, nested; their shape is the caller's to check.

    Raises:
        UserError: the file can't be read, is no pickle or a truncated one, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(field, path, f"must be a file that can be read ({error.strerror})") from None
    except BROKEN as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(field, path, f"{ALLOWED} ({reason})") from None
