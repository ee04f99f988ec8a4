"""The loss of labels in the file that an exported folder holds: plain cross-entropy, from all logits.

In the package, model/objective.py takes its place. That one never builds the logits, and knows a teacher's signals.

Legend: B batch, T positions, V vocabulary, D real width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

Signals = Objective = Any  # types of the package


class CrossEntropy(NamedTuple):
    """The loss under the names of the package's terms."""

    total: Tensor  # differentiable
    ce: Tensor  # nats


class TrainingLoss:
    """A base class of IndraQuantumPhase2, which gives the loss of labels."""

    def _terms(
        self,
        states_BTD: Tensor,
        table_VD: Tensor,
        amplitude_BT: Tensor,
        shift_labels_BT: Tensor,
        signals: Signals | None,
        objective: Objective | None,
        num_items_in_batch: float | Tensor | None,
    ) -> CrossEntropy:
        if signals is not None or objective is not None:
            raise ValueError("signals, objective: need the package indraquantum; import it before you load the model")
        logits_NV = self.logits(states_BTD, table_VD).flatten(0, 1).float()
        labels_N = shift_labels_BT.flatten().to(logits_NV.device)
        total = F.cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="sum")
        count = (labels_N != -100).sum() if num_items_in_batch is None else num_items_in_batch
        # A step without any label has a loss of 0.
        ce = total / max(1.0, float(count))
        return CrossEntropy(ce, ce.detach())
