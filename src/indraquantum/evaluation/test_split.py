"""The test split: it is for a last report alone, and every reading of it is recorded.

Training, searches, the tables of ablations and captures never read it. A figure on the test split is only valid while
nothing was chosen by it. So each command that reads it adds a line to a file beside the dataset, and prints how many
readings there were before.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.split import Split
from indraquantum.errors import UserError


class TestReading(NamedTuple):
    """The test split, and its earlier readings."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    split: Split
    earlier: tuple[str, ...]  # date and command of each earlier reading

    def __str__(self) -> str:
        """One line about the earlier readings."""
        if not self.earlier:
            return "The test split is read for the first time."
        times = "once" if len(self.earlier) == 1 else f"{len(self.earlier)} times"
        return f"The test split was read {times} before, the last time by: {self.earlier[-1]}."


def readings_path(data: Path) -> Path:
    """Return the path of the file beside the dataset at `data` that records the readings."""
    data = data.resolve()
    return data.parent / f"{data.name}.test_readings.jsonl"


def require_test_split(field: str, dataset: PreparedDataset) -> None:
    """Check that `dataset` has a test split, without reading it.

    Raises:
        UserError: it has no test split.
    """
    if dataset.test is None:
        allowed = "needs a dataset with a test split, which `indra prepare` makes if the sources are large enough"
        raise UserError(field, "test", allowed)


def read_test_split(field: str, data: Path, dataset: PreparedDataset, command: str) -> TestReading:
    """Record a reading of the test split of `dataset`, and return the split.

    Args:
        field: the option to name in an error.
        data: the dataset's folder.
        dataset: the dataset that was opened from there.
        command: the command that reads it, for the record.

    Raises:
        UserError: there is no test split, or the reading can't be recorded.
    """
    require_test_split(field, dataset)
    path, own = readings_path(data), dataset.content_sha256
    found, now = [], datetime.now(UTC).isoformat(timespec="seconds")
    added = json.dumps({"date": now, "command": command, "data": own}).encode() + b"\n"
    try:
        with path.open("a+b", buffering=0) as file:
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if _is_record(content[whole:]):  # an editor has removed the last line break
                content, added = content + b"\n", b"\n" + added
                whole = len(content)
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                command_and_date = _reading(line, own, field, path, number) if line.strip() else None
                found += [command_and_date] if command_and_date else []
            if whole < len(content):  # a record that was cut off, after which nothing was read
                file.truncate(whole)
            end = file.seek(0, os.SEEK_END)
            if file.write(added) != len(added):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(field, path, f"can't be written ({error.strerror}), so the test split is not read") from None
    return TestReading(dataset.test, tuple(found))


def _is_record(rest: bytes) -> bool:
    """Return whether what follows the last line break is a whole record."""
    try:
        return isinstance(json.loads(rest), dict)
    except ValueError:
        return False


def _reading(line: bytes, own: str, field: str, path: Path, number: int) -> str | None:
    """Return command and date of a recorded reading; None if it was of another dataset, which was in this place before.

    Raises:
        UserError: the line is damaged.
    """
    try:
        read = json.loads(line)
        return f"{read['command']} ({read['date']})" if read["data"] == own else None
    except (ValueError, KeyError, TypeError):
        allowed = f"is damaged: its line {number} does not record a reading of the test split; mend or remove that line"
        raise UserError(field, path, allowed) from None
