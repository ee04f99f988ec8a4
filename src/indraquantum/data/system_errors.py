"""The system's errors in libraries written in Rust: safetensors and tokenizers hide them in errors of their own."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_IN_RUST = re.compile(r"\(os error (\d+)\)")  # how Rust ends the message of an error of the system


@contextlib.contextmanager
def system_errors_shown(path: Path) -> Iterator[None]:
    """Inside, a write that the system refuses raises an OSError, whichever library writes.

    Args:
        path: what is written, for the message.

    Raises:
        OSError: the system refused a write, for example because the disk is full.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        if (found := _IN_RUST.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
