"""The test split: for a last report alone, and every reading of it is recorded.

Training, searches, ablations' tables and captures never touch it. A figure on it means what it says only while nothing
was chosen by it, so that each command that reads it leaves a line in a file beside the dataset, and says how many
there were before.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from indraquantum.data.dataset import PreparedDataset
from indraquantum.data.split import Split
from indraquantum.errors import UserError


class TestReading(NamedTuple):
    """The test split, in the hands of one that may read it, and what was read before."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    split: Split
    earlier: tuple[str, ...]  # date and command of each earlier reading

    def __str__(self) -> str:
        """One line for a reader."""
        if not self.earlier:
            return "The test split is read for the first time."
        return f"The test split was read {len(self.earlier)} times before, last by: {self.earlier[-1]}."


def readings_path(data: Path) -> Path:
    """The record of the readings of the dataset at `data`: a file beside it."""
    data = data.resolve()
    return data.parent / f"{data.name}.test_readings.jsonl"


def require_test_split(field: str, dataset: PreparedDataset) -> None:
    """Check that `dataset` has a test split; nothing of it is read.

    Raises:
        UserError: it has none.
    """
    if dataset.test is None:
        allowed = "needs a dataset with a test split; `indra prepare` holds one out of large enough sources"
        raise UserError(field, "test", allowed)


def read_test_split(field: str, data: Path, dataset: PreparedDataset, command: str) -> TestReading:
    """The test split of `dataset`, after its reading was recorded.

    Args:
        field: the option to name in an error.
        data: the dataset's folder.
        dataset: opened from there.
        command: what reads it, for the record.

    Raises:
        UserError: there is no test split, or the reading can't be recorded.
    """
    require_test_split(field, dataset)
    path, own = readings_path(data), dataset.content_sha256
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [line for line in map(json.loads, lines) if line["data"] == own]  # others: of a dataset that was here
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"date": now, "command": command, "data": own}) + "\n")
    except (ValueError, KeyError, TypeError):
        raise UserError(field, path, "is damaged: each line must record a reading of the test split") from None
    except OSError as error:
        raise UserError(field, path, f"can't be written ({error.strerror}), so the test split is not read") from None
    return TestReading(dataset.test, tuple(f"{line['command']} ({line['date']})" for line in found))
