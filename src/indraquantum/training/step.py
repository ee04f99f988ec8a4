"""An optimiser step as data: what it takes (`StepInput`) and what it brings (`StepResult`).

A plan says what each step is (`Plan.step(n)`), an engine does it (`Engine.step`). Two steps with equal inputs, on
models and optimisers in the same state, have the same result to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from indraquantum.data.split import Split
from indraquantum.kernels.arguments import Tail
from indraquantum.loss_v2 import TeacherSignals


class Signals(Protocol):
    """Where a step finds the teacher's signals: a `SignalStore`, or anything with its `batch`."""

    def batch(self, split: str, index_N: np.ndarray) -> TeacherSignals:
        """The signals at the positions `index_N` of the split called `split`, on the CPU."""


@dataclass(frozen=True, eq=False)
class StepInput:
    """Everything that decides an optimiser step, apart from the state of the model and of its optimiser."""

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
    temperature: float = 1.0  # at which the signals were captured
    tail: Tail = "none"  # what becomes of the probability that truncated signals don't store
    seed: int = 0  # of dropout, the only randomness of a step

    def __str__(self) -> str:
        weights = f"kd {self.kd_weight:g}, phase {self.phase_weight:g}, magnitude {self.magnitude_weight:g}"
        return f"{len(self.rows)} rows, learning rate {self.learning_rate:.3e}, weights {weights}"


@dataclass(frozen=True)
class StepResult:
    """What a step brought: the objective's terms averaged over its labelled tokens, and how the update went."""

    tokens: int  # real tokens, labelled or not
    grad_norm: float | None  # before clipping; None where float16 overflowed and the update was skipped
    terms: dict[str, float | None]  # see REPORTED_TERMS; None where absent
    readout: dict[str, float | None]  # mean and standard deviation of magnitude and phase


REPORTED_TERMS = ("loss", "ce", "kd", "kd_estimate", "phase", "magnitude")
