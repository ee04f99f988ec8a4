"""Batches of prepared rows with the teacher's signals, for training loops other than `indra train`.

    batches = SignalCollator("data/mixed_train", "data/teacher_signals")
    Trainer(model, arguments, train_dataset=batches.rows, data_collator=batches)

Legend: B rows, T positions, N = B*T, K most tokens that the teacher gave at one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from indraquantum.data.dataset import open_dataset
from indraquantum.teacher.signals import open_signals


class SignalCollator:
    """Turns row numbers into batches: what transformers' Trainer calls a data collator.

    Args:
        data: a prepared dataset, as `prepare` wrote it.
        signals: the folder of its signals, as `capture` wrote it; None leaves them out.
        split: train or validation.

    Attributes:
        rows: the numbers of all rows: the `train_dataset` of a Trainer.
        vocabulary_size: of the dataset's tokenizer.

    Raises:
        InvalidInput: the dataset or the signals can't be used, or they don't belong together.
    """

    def __init__(self, data: str | Path, signals: str | Path | None = None, split: str = "train") -> None:
        dataset = open_dataset("--data", Path(data))
        self._split, self._name = getattr(dataset, split), split
        self._signals = None if signals is None else open_signals("--signals", signals, dataset)
        self.rows = range(self._split.num_rows)
        self.vocabulary_size = dataset.tokenizer.vocabulary_size

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return the batch of `rows`.

        Returns:
            int64 tensors (B, T): `input_ids`, `position_ids` (each document begins at 0), `segment_ids` (the document's
            number within its row, -1 on padding), `labels` (-100 on padding) and `shift_labels` (the next token of
            the same document, or -100: what position t learns). `signals` is a dict of the fields of TeacherSignals
            for the N positions, row by row.
        """
        batch = self._split.batch(np.asarray(rows))
        ids, segments = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.segments)
        found: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": torch.from_numpy(batch.positions),
            "segment_ids": segments,
            "labels": ids.masked_fill(segments < 0, -100),
            "shift_labels": torch.from_numpy(batch.labels),
        }
        if self._signals is not None:
            signals = self._signals.batch(self._name, batch.index.reshape(-1))
            found["signals"] = {name: part for name, part in signals._asdict().items() if part is not None}
        return found
