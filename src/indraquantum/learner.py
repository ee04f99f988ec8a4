"""What training and evaluation need of a model: states against a table. Student and teacher both give it.

Legend: B rows, T positions, N positions of interest, D real width, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from indraquantum.data.split import Batch


class Learner(Protocol):
    """What can be trained here: hidden states against a table. IndraQuantumPhase2 is one, the Llama teacher another."""

    bias_V: Tensor | None
    scale: Tensor | None

    def lift_table(self) -> Tensor:
        """The output table (V, D)."""

    def hidden_states(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, segment_ids_BT: Tensor, table_VD: Tensor
    ) -> Tensor:
        """States (B, T, D) before the output table."""

    def logits(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Logits (..., V) of `states` (..., D) against the output table."""

    def amplitude(self, states_ND: Tensor) -> Tensor | None:
        """Complex readouts (N,), or None where there are none."""


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The parts of a batch that a model needs, as int64 tensors (B, T) on `device`."""
    names = {"input_ids": "input_ids_BT", "positions": "position_ids_BT", "segments": "segment_ids_BT"}
    return {names[name]: torch.from_numpy(getattr(batch, name)).to(device) for name in names}
