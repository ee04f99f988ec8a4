"""Guards that stop a run before something breaks it.

If a value is not finite, the run stops before the update that would spread it, and before the value reaches the disk.

Every PROBE_EVERY steps the guard measures a few rows, and compares the figures with the run's best so far. It reports a
kind of collapse if two measurements in a row find it, so at most 2 * PROBE_EVERY steps after its beginning. The
thresholds were measured at toy size and at V = 32,000 (docs/LOG.md). The metrics hold all figures.

Legend: N labelled positions of a micro-batch, K kept teacher tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indraquantum.data.split import Split
from indraquantum.errors import TrainingStopped
from indraquantum.evaluation.collapse import CollapseFigures, collapse_figures, dead_terms
from indraquantum.evaluation.held_out import rows_per_batch
from indraquantum.learner import Learner
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.processes import whole
from indraquantum.teacher.signals import SignalStore
from indraquantum.thresholds import THRESHOLDS


def require_finite_weights(groups: Iterable[dict]) -> None:
    """Check the weights of an optimiser's groups.

    Raises:
        TrainingStopped: some are NaN or infinite.
    """
    weights = [parameter.detach() for group in groups for parameter in group["params"]]
    if not math.isfinite(whole(torch.nn.utils.get_total_norm(weights)).item()):
        bad = sum(int((~whole(weight).isfinite()).sum()) for weight in weights)
        if bad:  # the norm may overflow although all weights are finite
            raise TrainingStopped(f"{bad:,} weights are not finite before the step begins")


def require_finite_signals(signals: TeacherSignals | None, rows_N: list[int]) -> None:
    """Check the teacher's signals, if there are any.

    Args:
        signals: the signals of N positions.
        rows_N: the row of each position.

    Raises:
        TrainingStopped: some are NaN or infinite; the message names the rows.
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
    """Return whether a loss and its gradients are finite."""
    return math.isfinite(loss) and all(bool(g.isfinite().all()) for g in gradients if g is not None)


def require_finite_state(model: dict[str, Any], optimizer: dict[str, Any], step: int) -> None:
    """Check the state_dicts that a checkpoint will hold.

    Raises:
        TrainingStopped: a weight or a tensor of the optimiser's state is NaN or infinite; it is named.
    """
    named = dict(model)
    for number, state in optimizer["state"].items():
        named |= {f"optimiser state {number}.{name}": value for name, value in state.items()}
    for name, value in named.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise TrainingStopped(f"step {step}: {name} is not finite, so no checkpoint was written")


PROBE_EVERY = 20  # optimiser steps
PROBE_ROWS = 4  # fewer if they are very long
LOOKS = 2  # how many looks in a row must find a collapse to confirm it


@dataclass
class CollapseGuard:
    """What the looks have found so far. It consists of plain values, so that a checkpoint can hold it."""

    best: dict[str, float] = field(default_factory=dict)  # the best value of each figure
    found: dict[str, int] = field(default_factory=dict)  # for each kind of collapse, how many looks in a row found it

    def look(self, figures: CollapseFigures, dead: list[str]) -> list[str]:
        """Record one look and return the kinds of collapse that it confirms."""
        suspects = [f"dead_{term}" for term in dead]
        for name, threshold in THRESHOLDS.items():
            value = getattr(figures, name)
            if value is None:
                continue
            self.best[name] = max(self.best.get(name, value), value)
            if self.best[name] >= threshold.meaningful and value < threshold.fraction * self.best[name]:
                suspects.append(name)
        self.found = {name: self.found.get(name, 0) + 1 for name in suspects}
        return [name for name, looks in self.found.items() if looks == LOOKS]

    @property
    def standing(self) -> list[str]:
        """The kinds of collapse that this look or an earlier one has confirmed."""
        return [name for name, looks in self.found.items() if looks >= LOOKS]


@dataclass(frozen=True)
class Look:
    """The result of one look: figures for the metrics, kinds that it confirms, and all kinds confirmed so far."""

    figures: dict[str, Any]
    confirmed: list[str]
    standing: list[str]


def probe(
    guard: CollapseGuard,
    learner: Learner,
    objective: SemanticDistillationLoss,
    train: Split,
    validation: Split,
    signals: SignalStore | None,
) -> Look:
    """Measure `learner` on a few rows and record the figures in `guard`. Its mode and weights do not change."""
    training = learner.training
    learner.eval()
    rows = np.arange(min(PROBE_ROWS, rows_per_batch(validation), validation.num_rows))
    figures = collapse_figures(learner, validation.batch(rows))
    dead = [] if signals is None else _dead_terms(learner, objective, train, signals)
    learner.train(training)
    confirmed = guard.look(figures, dead)
    return Look({**figures._asdict(), "collapse": sorted(guard.found) or None}, confirmed, guard.standing)


def _dead_terms(learner: Learner, objective: SemanticDistillationLoss, train: Split, signals: SignalStore) -> list[str]:
    """Return the dead terms on the first rows that have signals. Without signals, all terms would be dead."""
    first = min((entry.rows[0] for entry in signals.manifest.shards if entry.split == "train"), default=0)
    rows = np.arange(first, min(first + min(PROBE_ROWS, rows_per_batch(train)), train.num_rows))
    batch = train.batch(rows)
    with torch.enable_grad():
        return dead_terms(learner, objective, batch, signals.batch("train", batch.index[batch.labelled]))
