"""Reads the end of a metrics file, which costs the same for any length."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError
from indraquantum.metrics import Line

TAIL_BYTES = 1 << 18  # some 350 lines
EVALUATION_BYTES = 1 << 24  # some 20,000 lines: how far back an evaluation is looked for
LAST_LINES = 40
_EVALUATION = b'"held_out": {'


class Tail:
    """The whole lines at the end of a metrics file, of which only those that are needed are parsed."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            contents = file.read(TAIL_BYTES).split(b"\n")[:-1]
        self._lines = [Line(path, 0, content + b"\n") for content in contents[1 if size > TAIL_BYTES else 0 :]]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of the last lines, without damaged ones."""
        return _valid(self._lines[-LAST_LINES:])

    @property
    def collapse(self) -> list[str]:
        """The kinds of collapse that the last look suspected."""
        kinds = self._last_with("context_divergence").get("collapse")
        return [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []

    @property
    def held_out(self) -> dict[str, float]:
        """The figures of the last evaluation."""
        found = (self._last_with("held_out") or self._earlier_evaluation()).get("held_out")
        return {name: value for name, value in found.items() if type(value) is float} if isinstance(found, dict) else {}

    def _last_with(self, name: str) -> dict[str, Any]:
        """Return the metrics of the last line with a value for `name`, which most lines do not have."""
        line = next((line for line in reversed(self._lines) if not line.lacks(name)), None)
        found = _valid([line]) if line else []
        return found[0] if found else {}

    def _earlier_evaluation(self) -> dict[str, Any]:
        """Return the metrics of the last evaluation before these lines, if it is not too far back."""
        if self._size <= TAIL_BYTES:
            return {}
        with self._path.open("rb") as file:
            file.seek(max(0, self._size - EVALUATION_BYTES))
            content = file.read(min(self._size, EVALUATION_BYTES))
        end = content.rfind(b"\n")  # what follows is still being written
        while (place := content.rfind(_EVALUATION, 0, max(0, end))) >= 0:
            begin, end = content.rfind(b"\n", 0, place), content.find(b"\n", place)
            if found := _valid([Line(self._path, 0, content[begin + 1 : end + 1])]):
                return found[0]
            end = begin
        return {}


def _valid(lines: list[Line]) -> list[dict[str, Any]]:
    found, shapes = [], set[bytes]()
    for line in lines:
        with contextlib.suppress(UserError):
            line.check(shapes)
            found.append(line.parse())
    return found
