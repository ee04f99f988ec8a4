"""One optimiser step: lift the table once, go through the micro-batches, one update.

Legend: B rows, T positions, N labelled tokens of a micro-batch, D real width, V vocabulary, K kept teacher tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from indraquantum.config import OptimizerSettings
from indraquantum.data.dataset import Batch, Split
from indraquantum.errors import TrainingStopped
from indraquantum.kernels.onednn import onednn_products
from indraquantum.learner import Learner, to_tensors
from indraquantum.loss_v2 import LossTerms, SemanticDistillationLoss, TeacherSignals
from indraquantum.model.readout import wrapped_phase
from indraquantum.teacher.signals import SignalStore
from indraquantum.training.guards import all_finite, require_finite_signals, require_finite_weights
from indraquantum.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class StepResult:
    """What one step brought: the objective's terms averaged over its labelled tokens, and how the update went."""

    tokens: int  # real tokens, labelled or not
    grad_norm: float  # before clipping
    terms: dict[str, float | None]  # loss, ce, kd, kd_estimate, phase, magnitude; None where absent
    readout: dict[str, float | None]  # mean and standard deviation of magnitude and phase


def set_learning_rates(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, total_steps: int
) -> float:
    """Give each parameter group its rate at `step`, a multiple of the base rate, which is returned."""
    base = settings.learning_rate * learning_rate_factor(step, total_steps, settings.warmup_fraction)
    for group in optimizer.param_groups:
        group["lr"] = base * group["rate"]
    return base


@onednn_products()
def optimizer_step(
    learner: Learner,
    objective: SemanticDistillationLoss,
    optimizer: torch.optim.Optimizer,
    split: Split,
    rows: np.ndarray,
    signals: SignalStore | None,
    *,
    micro_batch_rows: int,
    max_grad_norm: float,
) -> StepResult:
    """Accumulate the gradients of `rows` and update the weights once.

    The table is lifted once: a detached leaf collects its gradient over the micro-batches, which then goes back
    through the projector once. Every term is divided by the labelled tokens of the whole step.

    Raises:
        TrainingStopped: a weight, signal, loss or gradient is not finite; the weights are left as they were.
    """
    device = next(iter(optimizer.param_groups[0]["params"])).device
    require_finite_weights(optimizer.param_groups)
    batches = [split.batch(rows[i : i + micro_batch_rows]) for i in range(0, len(rows), micro_batch_rows)]
    token_count = max(1, sum(int((batch.labels >= 0).sum()) for batch in batches))
    optimizer.zero_grad(set_to_none=True)
    table_VD = learner.lift_table()
    leaf_VD = table_VD.detach().requires_grad_()
    sums: dict[str, float] = {}
    amplitudes = []
    for number, batch in enumerate(batches):
        teacher = _teacher_of(batch, rows[number * micro_batch_rows :], signals, device)
        terms, amplitude_N = _accumulate(learner, objective, batch, leaf_VD, teacher, token_count)
        for name, value in _values(terms).items():
            sums[name] = sums.get(name, 0.0) + value
        if amplitude_N is not None:
            amplitudes.append(amplitude_N.detach())
    table_VD.backward(leaf_VD.grad)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True).item()
    if not (math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
        guilty = _guilty_rows(learner, objective, optimizer, split, rows, signals, token_count)
        raise TrainingStopped(
            f"loss {sums['loss']}, gradient norm {grad_norm}: not finite by rows {guilty}; the weights were not updated"
        )
    optimizer.step()
    return StepResult(
        tokens=sum(int((batch.index >= 0).sum()) for batch in batches),
        grad_norm=grad_norm,
        terms={name: sums.get(name) for name in ("loss", "ce", "kd", "kd_estimate", "phase", "magnitude")},
        readout=_readout_statistics(amplitudes),
    )


def _accumulate(
    learner: Learner,
    objective: SemanticDistillationLoss,
    batch: Batch,
    leaf_VD: Tensor,
    teacher: TeacherSignals | None,
    token_count: int,
) -> tuple[LossTerms, Tensor | None]:
    """Add a micro-batch's gradients to those of the weights and of the lifted table; its terms and readouts (N,)."""
    device = leaf_VD.device
    states_BTD = learner.hidden_states(**to_tensors(batch, device), table_VD=leaf_VD)
    labelled = batch.labels.reshape(-1) >= 0
    states_ND = states_BTD.flatten(0, 1)[torch.from_numpy(np.flatnonzero(labelled)).to(device)]
    labels_N = torch.from_numpy(batch.labels.reshape(-1)[labelled]).to(device)
    amplitude_N = learner.amplitude(states_ND)
    terms = objective(
        states_ND, leaf_VD, labels_N, learner.bias_V, learner.scale, teacher, amplitude_N, token_count=token_count
    )
    terms.total.backward()
    return terms, amplitude_N


def _teacher_of(
    batch: Batch, rows: np.ndarray, signals: SignalStore | None, device: torch.device
) -> TeacherSignals | None:
    """The teacher's signals at the labelled positions of `batch`, whose rows are the first of `rows`."""
    labelled = batch.labels >= 0
    teacher = teacher_signals(signals, batch.index[labelled], device)
    require_finite_signals(teacher, rows[np.nonzero(labelled)[0]].tolist())
    return teacher


def _guilty_rows(
    learner: Learner,
    objective: SemanticDistillationLoss,
    optimizer: torch.optim.Optimizer,
    split: Split,
    rows: np.ndarray,
    signals: SignalStore | None,
    token_count: int,
) -> list[int]:
    """The rows whose loss or gradient alone is not finite; all where none is so alone."""
    guilty = []
    for place, row in enumerate(rows.tolist()):
        optimizer.zero_grad(set_to_none=True)
        table_VD = learner.lift_table()
        leaf_VD = table_VD.detach().requires_grad_()
        batch = split.batch(rows[place : place + 1])
        teacher = _teacher_of(batch, rows[place:], signals, leaf_VD.device)
        terms, _ = _accumulate(learner, objective, batch, leaf_VD, teacher, token_count)
        table_VD.backward(leaf_VD.grad)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if not all_finite(terms.total.item(), gradients):
            guilty.append(row)
    return guilty or rows.tolist()


def teacher_signals(signals: SignalStore | None, index_N: np.ndarray, device: torch.device) -> TeacherSignals | None:
    """The teacher's signals at training positions `index_N` on `device`; None without signals."""
    if signals is None:
        return None
    found = signals.batch("train", index_N)
    return TeacherSignals(*(None if part is None else part.to(device) for part in found))


def _values(terms: LossTerms) -> dict[str, float]:
    present = {name: getattr(terms, name) for name in ("ce", "kd", "kd_estimate", "phase", "magnitude")}
    return {"loss": terms.total.item(), **{name: value.item() for name, value in present.items() if value is not None}}


def _readout_statistics(amplitudes: list[Tensor]) -> dict[str, float | None]:
    if not amplitudes:
        return dict.fromkeys(("magnitude_mean", "magnitude_std", "phase_mean", "phase_std"))
    amplitude_N = torch.cat(amplitudes)
    magnitude_N, phase_N = amplitude_N.abs(), wrapped_phase(amplitude_N.angle())
    return {
        "magnitude_mean": magnitude_N.mean().item(),
        "magnitude_std": magnitude_N.std(correction=0).item(),
        "phase_mean": phase_N.mean().item(),
        "phase_std": phase_N.std(correction=0).item(),
    }
