"""What training and evaluation need from a model. Student and teacher both provide it.

Legend: B rows, T positions, N positions of interest, D real width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from indraquantum.data.split import Batch


class Learner(Protocol):
    """A model that can be trained here: its logits are products of hidden states and a table.

    IndraQuantumPhase2 is one, and the Llama teacher is another.
    """

    @property
    def bias_V(self) -> Tensor | None:
        """Added to the logits (V,); None where there is none."""

    @property
    def scale(self) -> Tensor | None:
        """Multiplies the inner products of states and table; None where it is 1."""

    @property
    def training(self) -> bool:
        """Whether it is in training mode, as of any nn.Module."""

    def train(self, mode: bool = True) -> Self:
        """Put it into training mode, or out of it."""

    def eval(self) -> Self:
        """Put it into evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser changes."""

    def lift_table(self, ids_R: Tensor | None = None) -> Tensor:
        """Return the output table (V, D), or its rows (R, D) of the tokens `ids_R`."""

    def hidden_states(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, segment_ids_BT: Tensor, table_VD: Tensor | None
    ) -> Tensor:
        """Return the states (B, T, D) before the output table; without `table_VD` the inputs are lifted themselves."""

    def logits(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D) against the output table."""

    def amplitude(self, states_ND: Tensor) -> Tensor | None:
        """Return the complex readouts (N,), or None if the model has none."""


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the parts of a batch that a model needs, as int64 tensors (B, T) on `device`."""
    names = {"input_ids": "input_ids_BT", "positions": "position_ids_BT", "segments": "segment_ids_BT"}
    return {names[name]: torch.from_numpy(getattr(batch, name)).to(device) for name in names}


class LabelledPositions(NamedTuple):
    """The positions of a batch that have a label, in row order."""

    states_ND: Tensor
    labels_N: Tensor  # int64


def labelled_positions(states_BTD: Tensor, batch: Batch) -> LabelledPositions:
    """Select the positions of `batch` that have a label, from the states (B, T, D) that a learner made of it."""
    labelled, device = batch.labelled.reshape(-1), states_BTD.device
    states_ND = states_BTD.flatten(0, 1)[torch.from_numpy(np.flatnonzero(labelled)).to(device)]
    return LabelledPositions(states_ND, torch.from_numpy(batch.labels.reshape(-1)[labelled]).to(device))
