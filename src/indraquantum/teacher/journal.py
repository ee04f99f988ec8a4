"""The journal of an unfinished shard: the teacher's answers, batch by batch, so that a killed capture loses none.

Each unfinished shard has one append-only file, which is removed once the shard is in the manifest. A record consists of
the first row, the row past the last, the length, the number format, a SHA-256, and then the signals as safetensors. A
record that was cut off is dropped, with everything after it. Records are handed to the operating system at once, which
keeps them if the process dies. A crash of the whole machine may lose the newest records, but never damages a shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from indraquantum.errors import UserError
from indraquantum.teacher.sampling import PositionSignals

SUFFIX = ".journal"
_HEAD = struct.Struct("<QQQ16s")  # first row, row past the last, bytes of signals, number format
_DIGEST = 32  # bytes of the SHA-256 of head and signals, which stands between them


class Record(NamedTuple):
    """One batch of a shard."""

    first_row: int
    last_row: int  # one past
    precision: str  # the number format in which the teacher computed
    signals: PositionSignals


class Journal:
    """The journal of one shard.

    Attributes:
        records: the batches that it held when it was opened, one after the other from the shard's first row.
    """

    def __init__(self, folder: Path, shard_file: str, first_row: int, last_row: int) -> None:
        """Read the records, drop those that are cut off, and open the file for appending."""
        self.records: list[Record] = []
        whole = 0
        self._file = open(journal_path(folder, shard_file), "a+b")  # noqa: SIM115 - closed by close()
        fcntl.flock(self._file, fcntl.LOCK_EX)  # a worker of a capture that was killed may live a moment longer
        self._file.seek(0)
        content = self._file.read()
        for record, end in _records(content):
            expected = self.records[-1].last_row if self.records else first_row
            if record.first_row != expected or not expected < record.last_row <= last_row:
                break
            self.records.append(record)
            whole = end
        self._file.truncate(whole)

    def append(self, record: Record) -> int:
        """Append one batch and return the bytes that it takes.

        Raises:
            UserError: the file was removed.
        """
        from safetensors.numpy import save

        columns = {name: column for name, column in record.signals._asdict().items() if column is not None}
        payload = save(columns)
        head = _HEAD.pack(record.first_row, record.last_row, len(payload), record.precision.encode())
        if not os.fstat(self._file.fileno()).st_nlink:  # what is written to a removed file is lost without an error
            raise UserError("--output", Path(self._file.name).parent, "was removed while the capture wrote to it")
        written = self._file.write(head + hashlib.sha256(head + payload).digest() + payload)
        self._file.flush()
        return written

    def close(self) -> None:
        """Close the file; it stays until the shard is in the manifest."""
        self._file.close()


def journal_path(folder: Path, shard_file: str) -> Path:
    """Return the path of a shard's journal."""
    return folder / (shard_file + SUFFIX)


def _records(content: bytes) -> Iterator[tuple[Record, int]]:
    """Yield the complete records and where each ends, up to the first one that is cut off or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    begin = 0
    while (start := begin + _HEAD.size + _DIGEST) <= len(content):
        head = content[begin : begin + _HEAD.size]
        first_row, last_row, size, precision = _HEAD.unpack(head)
        payload = content[start : start + size]
        if len(payload) < size or hashlib.sha256(head + payload).digest() != content[start - _DIGEST : start]:
            return
        try:
            signals = PositionSignals(**load(payload))
        except (SafetensorError, TypeError):  # another version's
            return
        begin = start + size
        yield Record(first_row, last_row, precision.rstrip(b"\0").decode(), signals), begin
