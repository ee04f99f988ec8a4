"""Watches a run for collapse: every PROBE_EVERY steps it looks at a few rows and compares with the run's best so far.

A kind is reported when two looks in a row find it, so at most 2 * PROBE_EVERY steps after it set in. The thresholds
were measured at toy size and at V = 32,000 (docs/LOG.md); the figures are in the metrics, to be judged by eye.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from indraquantum.data.split import Split
from indraquantum.evaluation.collapse import CollapseFigures, collapse_figures, dead_terms
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.teacher.signals import SignalStore

PROBE_EVERY = 20  # optimiser steps
PROBE_ROWS = 4
LOOKS = 2  # looks in a row that must agree


@dataclass(frozen=True)
class Threshold:
    """A figure has collapsed once it is below `fraction` of its best, if that has been `meaningful` at all."""

    fraction: float
    meaningful: float


THRESHOLDS = {
    "context_divergence": Threshold(fraction=0.25, meaningful=0.2),
    "phase_rise": Threshold(fraction=0.1, meaningful=0.3),
    "magnitude_rise": Threshold(fraction=0.1, meaningful=0.2),
    "effective_rank": Threshold(fraction=0.1, meaningful=4.0),
}


@dataclass
class CollapseGuard:
    """What was seen so far; plain values, so that a checkpoint can hold them."""

    best: dict[str, float] = field(default_factory=dict)  # of each figure
    found: dict[str, int] = field(default_factory=dict)  # looks in a row that found it

    def look(self, figures: CollapseFigures, dead: list[str]) -> list[str]:
        """Take in one look; the kinds of collapse that have just been confirmed."""
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
        """The kinds of collapse that are confirmed, now or by an earlier look."""
        return [name for name, looks in self.found.items() if looks >= LOOKS]


@dataclass(frozen=True)
class Look:
    """What one look brought: figures for the metrics, what has just been confirmed, and what is since a while."""

    figures: dict[str, Any]
    confirmed: list[str]
    standing: list[str]


def look_at(
    guard: CollapseGuard,
    model: IndraQuantumPhase2,
    objective: SemanticDistillationLoss,
    train: Split,
    validation: Split,
    signals: SignalStore | None,
) -> Look:
    """Measure `model` on a few rows and tell `guard`; its mode and weights stay as they are."""
    training = model.training
    model.eval()
    rows = np.arange(min(PROBE_ROWS, validation.num_rows))
    figures = collapse_figures(model, validation.batch(rows))
    dead = [] if signals is None else _dead_terms(model, objective, train, signals)
    model.train(training)
    confirmed = guard.look(figures, dead)
    return Look({**figures._asdict(), "collapse": sorted(guard.found) or None}, confirmed, guard.standing)


def _dead_terms(
    model: IndraQuantumPhase2, objective: SemanticDistillationLoss, train: Split, signals: SignalStore
) -> list[str]:
    """Dead terms on the first rows that have signals; on rows without any, all would be."""
    first = min((entry.rows[0] for entry in signals.manifest.shards if entry.split == "train"), default=0)
    batch = train.batch(np.arange(first, min(first + PROBE_ROWS, train.num_rows)))
    found = signals.batch("train", batch.index[batch.labels >= 0])
    device = model.embedding.weight.device
    teacher = TeacherSignals(*(None if part is None else part.to(device) for part in found))
    with torch.enable_grad():
        return dead_terms(model, objective, batch, teacher)
