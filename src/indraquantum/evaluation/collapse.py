"""Shows whether a model is collapsing: figures that fall to 0 when it does, from a few rows, cheap enough for each run.

- context divergence: how much predictions depend on the context; 0 if the same tokens are predicted everywhere
- phase rise, magnitude rise: how much cross-entropy rises if all of the projector's phases are set to 0, or all of its
  magnitudes to their mean; 0 if that part of the state is not used. A residual stays as it is
- effective rank of the states of the tokens that were read, about their mean; a direction that all tokens share does
  not count, because it changes no prediction
- dead terms: terms of the objective whose value or gradient is exactly 0

Legend: N positions, D real width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indraquantum.data.split import Batch
from indraquantum.errors import TrainingStopped
from indraquantum.learner import Learner, labelled_positions, to_tensors
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.model.projector import QuantumProjector

POSITIONS = 128  # whose logits are looked at
WEIGHTS = {"kd": "kd_weight", "phase": "phase_weight", "magnitude": "magnitude_weight"}


class CollapseFigures(NamedTuple):
    """Each figure falls to 0 (the rank to 1) in its kind of collapse; None if the model has no such part."""

    context_divergence: float  # mean KL of the predictions from their own mean, nats
    phase_rise: float | None  # nats per token
    magnitude_rise: float | None  # nats per token
    effective_rank: float  # exp of the entropy of the normalised squared singular values


@torch.no_grad()  # not inference_mode, which FSDP2 does not support
def collapse_figures(model: Learner, batch: Batch) -> CollapseFigures:
    """Measure `model` on the rows of `batch`.

    Raises:
        TrainingStopped: its predictions, or one of the figures, are not finite.
    """
    table_VD = model.lift_table()
    logits_NV = _logits(model, batch, table_VD)
    if not (logits_NV.isfinite().all() and table_VD.isfinite().all()):
        raise TrainingStopped("predictions on held-out rows are not finite")
    labels_N = _thinned(torch.from_numpy(batch.labels[batch.labelled])).to(logits_NV.device)
    divergence, cross_entropy = context_divergence(logits_NV), F.cross_entropy(logits_NV, labels_N)
    read_ND = table_VD[torch.from_numpy(np.unique(batch.input_ids)).to(table_VD.device)]
    rank = effective_rank(read_ND - read_ND.mean(dim=0))
    del table_VD, logits_NV  # each change needs a table of its own, which has the size of the vocabulary

    def rise(part: Literal["phases", "magnitudes"]) -> float:
        with _without(part, model):
            changed_NV = _logits(model, batch, model.lift_table())
        return (F.cross_entropy(changed_NV, labels_N) - cross_entropy).item()

    phase_rise = magnitude_rise = None
    projector = getattr(model, "projector", None)  # a Llama has none
    if isinstance(projector, QuantumProjector):
        phase_rise = rise("phases")
        if projector.magnitude is not None:
            magnitude_rise = rise("magnitudes")
    found = CollapseFigures(divergence, phase_rise, magnitude_rise, rank)
    if not all(figure is None or math.isfinite(figure) for figure in found):
        raise TrainingStopped(f"the figures that show a collapse are not finite: {found._asdict()}")
    return found


@contextlib.contextmanager
def _without(part: Literal["phases", "magnitudes"], model: IndraQuantumPhase2) -> Iterator[None]:
    """Inside, each projector of `model` gives phases of 0, or the mean magnitudes of the table."""

    def changed(projector: QuantumProjector, embeddings: tuple[Tensor], _: Tensor) -> Tensor:
        magnitude, phase = projector.polar(embeddings[0])
        if part == "phases":
            phase = phase.zero_()
        else:
            magnitude = projector.polar(model.embedding.weight)[0].mean(dim=0).expand_as(phase)
        return projector.states(magnitude, phase)

    ends = [projector for projector in (model.projector, model.input_projector) if projector is not None]
    hooks = [projector.register_forward_hook(changed) for projector in ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def context_divergence(logits_NV: Tensor) -> float:
    """Return the mean KL of the N predictions from their own mean, in nats: 0 if they don't depend on the position."""
    log_p_NV = logits_NV.log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    log_mean_V = p_NV.mean(dim=0).log().clamp_min(-1e30)
    return p_NV.mul_(log_p_NV.sub_(log_mean_V)).sum(dim=-1).mean().item()


def effective_rank(states_ND: Tensor) -> float:
    """Return exp of the entropy of the squared singular values' shares: 1 for one direction, D for D equal ones."""
    states_ND = states_ND.cpu().double()  # MPS has no float64
    squared_D = torch.linalg.eigvalsh(states_ND.T @ states_ND).clamp_min(0)
    if squared_D.sum() == 0:
        return 0.0
    share_D = squared_D / squared_D.sum()
    return torch.special.entr(share_D).sum().exp().item()


def dead_terms(model: Learner, objective: SemanticDistillationLoss, batch: Batch, teacher: TeacherSignals) -> list[str]:
    """The terms of positive weight whose value, or whose part of the gradient to the states, is exactly 0.

    Args:
        model: the model in training.
        objective: the objective with the weights of the step.
        batch: rows with signals.
        teacher: the signals at the labelled positions of `batch`, on any device.
    """
    with torch.no_grad():
        table_VD = model.lift_table()
        states_BTD = model.hidden_states(**to_tensors(batch, table_VD.device), table_VD=table_VD)
    states_ND, labels_N = labelled_positions(states_BTD, batch)
    teacher = teacher.to(table_VD.device)

    def gradient(without: str | None = None) -> tuple[Tensor, dict[str, float | None]]:
        part = copy.copy(objective)
        if without is not None:
            setattr(part, WEIGHTS[without], 0.0)
        leaf_ND = states_ND.clone().requires_grad_()
        terms = part(leaf_ND, table_VD, labels_N, model.bias_V, model.scale, teacher, model.amplitude(leaf_ND))
        (gradient_ND,) = torch.autograd.grad(terms.total, leaf_ND)
        return gradient_ND, {name: getattr(terms, name) for name in WEIGHTS}

    whole_ND, values = gradient()
    alive = [name for name, weight in WEIGHTS.items() if getattr(objective, weight) > 0]
    return [
        name
        for name in alive
        if values[name] is None or float(values[name]) == 0 or torch.equal(whole_ND, gradient(without=name)[0])
    ]


def _thinned(values: Tensor) -> Tensor:
    """Return at most POSITIONS of the entries, evenly spaced."""
    return values[:: max(1, -(-len(values) // POSITIONS))]


def _logits(model: Learner, batch: Batch, table_VD: Tensor) -> Tensor:
    """Logits (N, V) at some labelled positions; `table_VD` is the lifted table."""
    states_BTD = model.hidden_states(**to_tensors(batch, table_VD.device), table_VD=table_VD)
    states_ND = _thinned(labelled_positions(states_BTD, batch).states_ND)
    return model.logits(states_ND, table_VD).float()
