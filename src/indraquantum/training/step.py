"""An optimiser step as data: its input (`StepInput`) and its result (`StepResult`).

A plan gives the input of each step (`Plan.step(n)`), and an engine does the step (`Engine.step`). Two steps with equal
inputs, on models and optimisers in the same state, have the same result to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from indraquantum.data.split import Split
from indraquantum.kernels.arguments import Tail
from indraquantum.loss_v2 import TeacherSignals


class Signals(Protocol):
    """The source of the teacher's signals for a step: a `SignalStore`, or another object with this method."""

    def batch(self, split: str, index_N: np.ndarray) -> TeacherSignals:
        """Return the signals at the positions `index_N` of the split with the name `split`, on the CPU."""


@dataclass(frozen=True, eq=False)
class StepInput:
    """Everything that decides an optimiser step, except the state of the model and of its optimiser."""

    split: Split
    rows: np.ndarray  # numbers of the rows in `split`, for all processes together
    micro_batch_rows: int  # rows of one forward pass
    learning_rate: float  # the base rate; each parameter group has its multiple
    table_rate: float = 1.0  # the multiple of the group called "table"
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm
    signals: Signals | None = None
    kd_weight: float = 0.0
    phase_weight: float = 0.0
    magnitude_weight: float = 0.0
    temperature: float = 1.0  # the temperature at which the signals were captured
    tail: Tail = "none"  # what to do with the probability that truncated signals don't store
    seed: int = 0  # the seed of dropout, the only randomness of a step

    def __str__(self) -> str:
        weights = f"kd {self.kd_weight:g}, phase {self.phase_weight:g}, magnitude {self.magnitude_weight:g}"
        return f"{len(self.rows)} rows, learning rate {self.learning_rate:.3e}, weights {weights}"


@dataclass(frozen=True)
class StepResult:
    """The result of a step: the objective's terms, averaged over the labelled tokens, and figures of the update."""

    tokens: int  # real tokens, labelled or not
    grad_norm: float | None  # before clipping; None if float16 overflowed and the update was skipped
    terms: dict[str, float | None]  # see REPORTED_TERMS; None for a term that does not exist
    readout: dict[str, float | None]  # mean and standard deviation of magnitude and phase


REPORTED_TERMS = ("loss", "ce", "kd", "kd_estimate", "phase", "magnitude")
