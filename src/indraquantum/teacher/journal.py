"""What the teacher has already said about an unfinished shard, batch by batch, so that a kill loses no answer.

One append-only file for each shard that is under way; it goes when the shard is in the manifest. A record is first
row, row past the last, length, number format and SHA-256, and then the signals as safetensors. A record that a kill
cut off, and whatever lies behind it, is dropped. Records are handed to the operating system at once, which keeps them
when the process dies; a crash of the whole machine may lose the newest, never damage a shard.
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
    precision: str  # number format that the teacher computed in
    signals: PositionSignals


class Journal:
    """The journal of one shard.

    Attributes:
        records: what it held when it was opened: batches that lie one after the other from the shard's first row.
    """

    def __init__(self, folder: Path, shard_file: str, first_row: int, last_row: int) -> None:
        """Read what there is, drop what is torn and open the file for appending."""
        self.records: list[Record] = []
        whole = 0
        self._file = open(journal_path(folder, shard_file), "a+b")  # noqa: SIM115 - closed by close()
        fcntl.flock(self._file, fcntl.LOCK_EX)  # a worker whose parent was killed may live a moment longer
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
        """Keep one batch and return the bytes that it takes.

        Raises:
            UserError: the file was removed, with all that it held.
        """
        from safetensors.numpy import save

        columns = {name: column for name, column in record.signals._asdict().items() if column is not None}
        payload = save(columns)
        head = _HEAD.pack(record.first_row, record.last_row, len(payload), record.precision.encode())
        if not os.fstat(self._file.fileno()).st_nlink:  # what is written to it now would go without a word
            raise UserError("--output", Path(self._file.name).parent, "was removed while the capture wrote to it")
        written = self._file.write(head + hashlib.sha256(head + payload).digest() + payload)
        self._file.flush()
        return written

    def close(self) -> None:
        """Close the file; it stays until the shard is in the manifest."""
        self._file.close()


def journal_path(folder: Path, shard_file: str) -> Path:
    """Where the journal of a shard lies."""
    return folder / (shard_file + SUFFIX)


def _records(content: bytes) -> Iterator[tuple[Record, int]]:
    """The whole records and where each ends, up to the first that is torn or damaged."""
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
