"""Guards: what is not a number stops the run before the update that would spread it, and before it reaches a disk.

Legend: N labelled positions of a micro-batch, K kept teacher tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from indraquantum.errors import TrainingStopped
from indraquantum.loss_v2 import TeacherSignals
from indraquantum.processes import whole


def require_finite_weights(groups: Iterable[dict]) -> None:
    """Check the weights of an optimiser's groups.

    Raises:
        TrainingStopped: some are NaN or infinite.
    """
    weights = [parameter.detach() for group in groups for parameter in group["params"]]
    if not math.isfinite(whole(torch.nn.utils.get_total_norm(weights)).item()):
        bad = sum(int((~whole(weight).isfinite()).sum()) for weight in weights)
        if bad:  # the norm alone may overflow
            raise TrainingStopped(f"{bad:,} weights are not finite, whatever the rows")


def require_finite_signals(signals: TeacherSignals | None, rows_N: list[int]) -> None:
    """Check the teacher's signals where there are any.

    Args:
        signals: of N positions.
        rows_N: the row of each position.

    Raises:
        TrainingStopped: some are NaN or infinite; the rows are named.
    """
    if signals is None:
        return
    finite_N = signals.probs_NK.isfinite().all(dim=1)
    for values_N in (signals.entropy_N, signals.confidence_N, signals.temperature_entropy_N):
        if values_N is not None:
            finite_N = finite_N & values_N.isfinite()
    bad_N = ~finite_N & (signals.ids_NK >= 0).any(dim=1)
    if bad_N.any():
        rows = sorted({rows_N[place] for place in bad_N.nonzero().flatten().tolist()})
        raise TrainingStopped(f"the teacher's signals of rows {rows} are not finite; the weights were not updated")


def all_finite(loss: float, gradients: Iterable[Tensor | None]) -> bool:
    """Whether a loss and its gradients are finite."""
    return math.isfinite(loss) and all(bool(g.isfinite().all()) for g in gradients if g is not None)


def require_finite_state(model: dict[str, Any], optimizer: dict[str, Any], step: int) -> None:
    """Check the state_dicts that a checkpoint is to hold.

    Raises:
        TrainingStopped: a weight or a tensor of the optimiser's state is NaN or infinite; it is named.
    """
    named = dict(model)
    for number, state in optimizer["state"].items():
        named |= {f"optimiser state {number}.{name}": value for name, value in state.items()}
    for name, value in named.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise TrainingStopped(f"step {step}: {name} is not finite, so no checkpoint was written")
