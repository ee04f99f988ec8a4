"""The metrics of a run: one JSON object a line, append-only, the one contract between training and every reader.

Every line has the same keys (FIELDS); a figure that does not exist at that step is null. The notebook and the plots
read these files and nothing else; `indra runs` also reads the settings in `run.json` beside them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError
from indraquantum.files import atomic_file
from indraquantum.trackers import NullTracker

RECORD_NAME = "run.json"  # beside the metrics: what the run is
FIELDS = {
    "step": "optimiser steps done; 0 is before training",
    "tokens": "real tokens seen so far",
    "stage": "name of the strategy's stage; null before training",
    "epoch": "epochs done, a fraction",
    "loss": "the whole objective, nats per labelled token",
    "ce": "cross-entropy of the batch, nats per token",
    "kd": "KL to the teacher's signals, times temperature squared, 0 without any; from draws it never reaches 0, with "
    "a bucket for the tail of top-k signals it is at most the true KL",
    "kd_estimate": "unbiased estimate of the true KL where there are signals; may dip below 0; null for topk",
    "phase": "phase term: mean circular distance, 0 to 2, and 0 at tokens without signals",
    "magnitude": "magnitude term: mean squared error, 0 at tokens without signals",
    "kd_weight": "weight of kd at this step",
    "phase_weight": "weight of the phase term",
    "magnitude_weight": "weight of the magnitude term",
    "magnitude_mean": "mean readout magnitude |c| over the batch",
    "magnitude_std": "its standard deviation",
    "phase_mean": "mean readout phase over the batch, radians in (-pi/2, 3pi/2]",
    "phase_std": "its standard deviation",
    "learning_rate": "learning rate of the backbone at this step",
    "grad_norm": "global norm of the gradients before clipping; null where float16 left the update out",
    "tokens_per_second": "real tokens per second of this step",
    "held_out": "cross-entropy per source on held-out text, nats per token, or null",
    "context_divergence": "mean KL of the predictions from their own mean, nats; 0 where they ignore the context",
    "phase_rise": "rise of held-out cross-entropy with all phases at 0, nats per token; 0 where phases are unused",
    "magnitude_rise": "rise of held-out cross-entropy with all magnitudes at their mean, nats per token",
    "effective_rank": "effective rank of the states of some tokens about their mean, at most twice d-model",
    "collapse": "kinds of collapse suspected at this step, or null",
}


class MetricsLog:
    """Appends lines to a metrics file; a resumed run keeps the lines up to its step and drops the rest.

    Args:
        path: the file.
        resumed_step: the last step whose line is kept; None begins a new file.
        tracker: gets every line too.
    """

    def __init__(self, path: Path, resumed_step: int | None = None, tracker: NullTracker | None = None) -> None:
        self.path, self._tracker = path, tracker or NullTracker()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resumed_step is None else [m for m in read_metrics(path) if m["step"] <= resumed_step]
        content = "".join(_line(metrics) for metrics in kept)
        try:
            with atomic_file(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._not_written(len(content), error) from None

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line with all of FIELDS, in one write so that a reader never sees half of it as a whole.

        Raises:
            KeyError: a name that FIELDS lacks.
            UserError: the line can't be written; the lines before it are unharmed.
        """
        unknown = metrics.keys() - FIELDS.keys()
        if unknown:
            raise KeyError(f"not in the metrics schema: {sorted(unknown)}")
        line = _line({name: metrics.get(name) for name in FIELDS}).encode()
        end = self._file.tell()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._not_written(len(line), error) from None
        if written != len(line):  # the disk is full: what a later start would take for a torn line goes
            self._file.truncate(end)
            raise self._not_written(len(line), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        self._tracker.log(metrics)

    def _not_written(self, size: int, error: OSError) -> UserError:
        free = shutil.disk_usage(self.path.parent).free
        return UserError(
            "--logs", self.path, f"could not be written: {error.strerror} ({size:,} bytes needed, {free:,} free)"
        )

    def sync(self) -> None:
        """Put everything on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(0, error) from None

    def close(self) -> None:
        """Put everything on disk and close the file."""
        try:
            self.sync()
        finally:
            self._file.close()
            self._tracker.close()


class NoLog:
    """The log of a process that writes none."""

    def write(self, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _line(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line that is still being written is left out, no file is no lines.

    Raises:
        UserError: a line is damaged.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    found = []
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError("--logs", path, f"is damaged: its line {number} is no JSON; remove that line") from None
    return found
