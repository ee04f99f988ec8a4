"""The metrics of a run: an append-only file with a JSON object on each line, which all readers share.

Every line has the same keys (FIELDS) and a checksum. A figure that does not exist at a step is null. The notebook and
the plots read only these files; `indra runs` also reads the settings in `run.json` beside them.

A file may have millions of lines. They are read one by one: all are checked, and only those that are needed are parsed.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from indraquantum.errors import UserError
from indraquantum.files import atomic_file, names_aside, not_written, read_json
from indraquantum.trackers import NullTracker

METRICS_NAME = "metrics.jsonl"  # in the folder of a run's logs
RECORD_NAME = "run.json"  # beside the metrics, with the run's settings
RECORD_KINDS = {"settings": dict, "total_steps": int | None, "finished": bool}
RECORD_BYTES = 1 << 20  # none is ever as large
FIELDS = {
    "step": "optimiser steps done; 0 is before training",
    "tokens": "real tokens seen so far",
    "stage": "name of the strategy's stage; null before training",
    "epoch": "epochs done, with decimals",
    "loss": "the whole objective, nats per labelled token",
    "ce": "cross-entropy of the batch, nats per token",
    "kd": "KL divergence from the teacher's signals as given, times temperature squared; 0 at tokens without signals, "
    "null in a stage without signals. With sampled signals it never reaches 0. With top-k signals and `--tail bucket` "
    "it is at most the true KL",
    "kd_estimate": "estimate of the true KL from the teacher's stored entropy, 0 at tokens without signals; may be "
    "below 0; null without signals and for top-k signals. It is unbiased, but for the small error of a sampled softmax",
    "phase": "phase term: mean circular distance, 0 to 2, and 0 at tokens without signals; null in a stage without "
    "signals",
    "magnitude": "magnitude term: mean squared error, 0 at tokens without signals; null in a stage without signals",
    "kd_weight": "weight of kd at this step",
    "phase_weight": "weight of the phase term",
    "magnitude_weight": "weight of the magnitude term",
    "magnitude_mean": "mean magnitude of the readout over the batch",
    "magnitude_std": "standard deviation of this magnitude over the batch",
    "phase_mean": "mean phase of the readout over the batch, radians in (-pi/2, 3pi/2]",
    "phase_std": "standard deviation of this phase over the batch",
    "phase_circular_variance": "circular variance of this phase: 0 if all phases are equal, 1 if they cancel out. "
    "Unlike phase_std, it does not depend on where the circle is cut. Earlier versions did not write it",
    "learning_rate": "learning rate of the backbone at this step",
    "grad_norm": "global norm of the gradients before clipping; null where float16 skipped the update",
    "tokens_per_second": "real tokens per second of this step",
    "held_out": "cross-entropy per source on held-out text, nats per token, or null",
    "context_divergence": "mean KL of the predictions from their own mean, nats; 0 if they ignore the context",
    "phase_rise": "rise of the held-out cross-entropy if all phases are set to 0, nats per token; 0 if unused",
    "magnitude_rise": "rise of the held-out cross-entropy if all magnitudes are set to their mean, nats per token",
    "effective_rank": "effective rank of the states of some tokens about their mean, at most the transformer's width",
    "collapse": "kinds of collapse suspected at this step, or null",
}


class MetricsLog:
    """Appends lines to a metrics file. A resumed run keeps the lines up to its step and drops the rest.

    Args:
        path: the file.
        resumed_step: the last step whose line is kept; None begins a new file.
        tracker: a tracker that gets every line too.
    """

    def __init__(self, path: Path, resumed_step: int | None = None, tracker: NullTracker | None = None) -> None:
        self.path, self._tracker = path, tracker or NullTracker()
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        try:
            with atomic_file(path) as temporary, temporary.open("wb") as kept:
                for line in _up_to(path, -1 if resumed_step is None else resumed_step):
                    size += kept.write(line.content)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise self._not_written(size, error) from None

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line with all of FIELDS, in one write, so that no reader takes half a line for a whole one.

        Raises:
            KeyError: a name is not in FIELDS.
            UserError: the line can't be written; the lines before it are unharmed.
        """
        unknown = metrics.keys() - FIELDS.keys()
        if unknown:
            raise KeyError(f"not in the metrics schema: {sorted(unknown)}")
        line = _line({name: metrics.get(name) for name in FIELDS})
        end = self._file.tell()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._not_written(len(line), error) from None
        if written != len(line):  # the disk is full: remove the incomplete line
            self._file.truncate(end)
            raise self._not_written(len(line), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._tracker.log(metrics)

    def _not_written(self, size: int | None, error: OSError) -> UserError:
        return not_written("--logs", self.path, size, error)

    def is_there(self) -> bool:
        """Return whether `path` is still the file that is written. Writing to a removed file gives no error."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def put_back(self) -> Path:
        """Write all lines to `path` again after it was removed, or beside it if another file is there now.

        Raises:
            UserError: they can't be written.
        """
        self._file.seek(0)
        content = self._file.read()
        path = names_aside(self.path)[0] if self.path.exists() else self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise not_written("--logs", path, len(content), error) from None
        return path

    def sync(self) -> None:
        """Write everything to the disk."""
        self._tracker.flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(None, error) from None

    def close(self, failed: bool = False) -> None:
        """Write everything to the disk and close the file. `failed` says that the run did not come to its end."""
        try:
            self.sync()
        finally:
            self._file.close()
            self._tracker.close(failed)


class NoLog:
    """The log of a process that does not write metrics."""

    def write(self, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self, failed: bool = False) -> None:
        """Nothing."""


CHECKSUM = b', "crc": "%08x"}\n'  # ends a line: CRC-32 of the bytes before it
_CHECKSUM_BYTES = len(CHECKSUM % 0)
_LONGEST = 1 << 20  # the most bytes that a line can have
_FIGURES = b"0123456789.+-e"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def _line(metrics: dict[str, Any]) -> bytes:
    body = json.dumps(metrics, allow_nan=False)[:-1].encode()
    return body + CHECKSUM % zlib.crc32(body)


@cache
def _null(name: str) -> bytes:
    return b'"%s": null' % name.encode()


class Line(NamedTuple):
    """A complete line of a metrics file."""

    path: Path
    number: int  # from 1
    content: bytes  # with its line break

    def lacks(self, name: str) -> bool:
        """Return whether the line has null for `name`. False does not mean that it has a figure."""
        return _null(name) in self.content

    @property
    def step(self) -> int:
        """Optimiser steps done, read without parsing the rest."""
        digits = self.content[9 : self.content.find(b",", 9)]
        if self.content.startswith(b'{"step": ') and digits.isdigit() and len(digits) < 19:
            return int(digits)
        if type(step := self.parse().get("step")) is not int:
            raise self.damaged("has no step")
        return step

    def parse(self) -> dict[str, Any]:
        """Return the metrics without the checksum.

        Raises:
            UserError: the line is not a JSON object, or has an unknown key.
        """
        text = self.content[:-_CHECKSUM_BYTES] + b"}" if _fits(self.content) else self.content
        try:
            metrics = _decode(str(text, "utf-8"))
        except (ValueError, RecursionError):
            raise self.damaged("is no JSON") from None
        if not isinstance(metrics, dict):
            raise self.damaged("is not a JSON object")
        if unknown := metrics.keys() - FIELDS.keys():
            raise self.damaged(f"has an unknown key, {ascii(min(unknown))[:40]}")
        return metrics

    def check(self, shapes: set[bytes]) -> None:
        """Check the line against its checksum.

        A line of an earlier version has no checksum and is parsed, unless it has one of the `shapes` of parsed lines,
        which this method collects. Only digits can differ between lines of the same shape.

        Raises:
            UserError: it is damaged.
        """
        if _has_checksum(self.content):
            if not _fits(self.content):
                raise self.damaged("does not match its checksum")
        elif self.content.endswith(b"\n"):
            shape = self.content.translate(None, _FIGURES)
            if shape not in shapes:
                self.parse()
                if len(shapes) < 1000:
                    shapes.add(shape)
        else:
            raise self.damaged("is longer than any line of a run")

    def damaged(self, how: str) -> UserError:
        """Return the error that says so."""
        return UserError("--logs", self.path, f"is damaged: its line {self.number} {how}; remove that line")


def checked_lines(path: Path) -> Iterator[Line]:
    """Yield the complete lines of a metrics file, without a last line that is still being written.

    There are none if the file does not exist. A line is checked against its checksum. A line of an earlier version has
    no checksum and is parsed, unless it has the shape of a parsed line, from which only digits can differ.

    Raises:
        UserError: a line is damaged.
    """
    if not path.exists():
        return
    shapes: set[bytes] = set()
    with path.open("rb", buffering=_LONGEST) as file:
        for number, content in enumerate(iter(partial(file.readline, _LONGEST), b""), start=1):
            # This is what `raw_lines` and `Line.check` do, without calls: two thousand runs have many lines.
            line = Line(path, number, content)
            if not content.endswith(CHECKSUM % zlib.crc32(content[:-_CHECKSUM_BYTES])):
                if _is_incomplete(content):
                    return
                line.check(shapes)
            yield line


def _is_incomplete(content: bytes) -> bool:
    """Return whether a line is still being written, or was cut off when the process was killed."""
    return not (content.endswith(b"\n") or len(content) == _LONGEST or _has_checksum(content))


def raw_lines(file: BinaryIO, path: Path, before: int = 0) -> Iterator[Line]:
    """Yield the lines of an open metrics file from its present position on, unchecked. `before` lines are before it.

    A last line that is incomplete is left out: it is still being written, or was cut off when the process was killed.
    """
    for number, content in enumerate(iter(partial(file.readline, _LONGEST), b""), start=before + 1):
        if _is_incomplete(content):
            return
        yield Line(path, number, content)


def _has_checksum(content: bytes) -> bool:
    """Return whether a line has a checksum where it ends, right or wrong."""
    return content[-_CHECKSUM_BYTES : -_CHECKSUM_BYTES + 10] == CHECKSUM[:10]


def _fits(content: bytes) -> bool:
    """Return whether a line ends with its checksum."""
    return content.endswith(CHECKSUM % zlib.crc32(content[:-_CHECKSUM_BYTES]))


def _up_to(path: Path, step: int) -> Iterator[Line]:
    """Yield the lines up to that of `step`. Later lines may be damaged, because they were not all on the disk."""
    for line in checked_lines(path) if step >= 0 else ():
        if line.step > step:
            return
        yield line
        if line.step == step:
            return


def metrics_up_to(path: Path, step: int | None) -> Iterator[dict[str, Any]]:
    """Yield the metrics of the lines up to that of `step`; none if `step` is None."""
    return (line.parse() for line in _up_to(path, -1 if step is None else step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the metrics of a file's complete lines; see `checked_lines`.

    Raises:
        UserError: a line is damaged.
    """
    return [line.parse() for line in checked_lines(path)]


def last_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics of a file's last complete line, which must be there.

    Raises:
        UserError: a line is damaged.
    """
    *_, last = checked_lines(path)
    return last.parse()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of `run.json` in `folder`; None if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    record = read_json("--logs", path, at_most=RECORD_BYTES)
    if not isinstance(record, dict):
        raise UserError("--logs", path, "must be the record of a run, which is a JSON object")
    record = {"settings": None, "total_steps": None, "finished": False, **record}
    for name, kind in RECORD_KINDS.items():
        if not isinstance(record[name], kind) or (name == "total_steps" and isinstance(record[name], bool)):
            raise UserError("--logs", path, f"must be the record of a run: its {name} is missing or wrong")
    return record
