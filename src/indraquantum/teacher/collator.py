"""Batches of prepared rows with the teacher's signals, for training loops other than `indra train`.

    batches = SignalCollator("data/mixed_train", "data/teacher_signals")
    held_out = SignalCollator("data/mixed_train", "data/teacher_signals", split="validation")
    Trainer(model, arguments, train_dataset=batches.rows, eval_dataset=held_out.rows, data_collator=batches)

Legend: B rows, T positions, N = B*T, K most tokens that the teacher gave at one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from indraquantum.data.dataset import open_dataset
from indraquantum.errors import InvalidInput
from indraquantum.teacher.sampling import SPLITS
from indraquantum.teacher.signals import open_signals


class Row(NamedTuple):
    """Which row of a dataset it is. It names its split because a Trainer has one collator for all of them."""

    split: str  # train or validation
    number: int


class Rows(Sequence[Row]):
    """Some rows of a split, made as they are asked for."""

    def __init__(self, split: str, numbers: range) -> None:
        self._split, self._numbers = split, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """Return the row at `index`, or the rows of a slice."""
        found = self._numbers[index]
        return Rows(self._split, found) if isinstance(found, range) else Row(self._split, found)


class SignalCollator:
    """Turns rows into batches: what transformers' Trainer calls a data collator.

    Args:
        data: a prepared dataset, as `prepare` wrote it.
        signals: the folder of its signals, as `capture` wrote it; None leaves them out.
        split: train or validation.

    Attributes:
        rows: all rows of the split: the `train_dataset` or `eval_dataset` of a Trainer. Each names its split, so the
            collator of either split makes batches of them.
        vocabulary_size: of the dataset's tokenizer.
        temperature: at which the signals were captured, 1.0 without signals: that of the objective.

    Raises:
        InvalidInput: the dataset or the signals can't be used, they don't belong together, or the dataset or the
            signals have no such split.
    """

    def __init__(self, data: str | Path, signals: str | Path | None = None, split: str = "train") -> None:
        dataset = open_dataset("--data", Path(data))
        self._splits, self._split = dataset.splits, split
        self._signals = None if signals is None else open_signals("--signals", signals, dataset)
        self._require_split(split)
        self.rows = Rows(split, range(self._splits[split].num_rows))
        self.vocabulary_size = dataset.tokenizer.vocabulary_size
        self.temperature = 1.0 if self._signals is None else self._signals.manifest.temperature

    def __call__(self, rows: Sequence[Row | int]) -> dict[str, Any]:
        """Return the batch of `rows`.

        Args:
            rows: items of `rows`, all of one split, or numbers of rows of this collator's own split.

        Returns:
            int64 tensors (B, T): `input_ids`, `position_ids` (each document begins at 0), `segment_ids` (the document's
            number within its row, -1 on padding), `labels` (-100 on padding) and `shift_labels` (the next token of
            the same document, or -100: what position t learns). `signals` is a dict of the fields of TeacherSignals
            for the N positions, row by row.

        Raises:
            ValueError: the rows are of several splits, or of one that the dataset or the signals do not have.
        """
        named = [row if isinstance(row, Row) else Row(self._split, row) for row in rows]
        split, *others = sorted({row.split for row in named})
        if others:
            raise ValueError(f"rows: got rows of {split} and {others[0]}; must be of one split")
        self._require_split(split)
        batch = self._splits[split].batch(np.array([row.number for row in named]))
        ids, segments = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.segments)
        found: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": torch.from_numpy(batch.positions),
            "segment_ids": segments,
            "labels": ids.masked_fill(segments < 0, -100),
            "shift_labels": torch.from_numpy(batch.labels),
        }
        if self._signals is not None:
            signals = self._signals.batch(split, batch.index.reshape(-1))
            found["signals"] = {name: part for name, part in signals._asdict().items() if part is not None}
        return found

    def _require_split(self, split: str) -> None:
        known = [name for name in self._splits if self._signals is None or name in SPLITS]
        if split not in known:
            having = "" if self._signals is None else " with signals"
            raise InvalidInput("--split", split, f"must be {' or '.join(known)}, the splits of the dataset{having}")
