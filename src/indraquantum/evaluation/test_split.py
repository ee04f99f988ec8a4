"""The test split: it is for a last report alone, and every reading of it is recorded.

Training, searches, the tables of ablations and captures never read it. A figure on the test split is only valid while
nothing was chosen by it. So each command that reads it adds a line to a file beside the dataset, and prints how many
readings there were before.
"""

from __future__ import annotations

import json
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
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # Lines of other datasets are of those that were in this place before.
        found = [f"{line['command']} ({line['date']})" for line in map(json.loads, lines) if line["data"] == own]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"date": now, "command": command, "data": own}) + "\n")
    except (ValueError, KeyError, TypeError):
        raise UserError(field, path, "is damaged: each line must record a reading of the test split") from None
    except OSError as error:
        raise UserError(field, path, f"can't be written ({error.strerror}), so the test split is not read") from None
    return TestReading(dataset.test, tuple(found))
