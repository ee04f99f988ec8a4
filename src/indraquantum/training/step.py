"""One optimiser step: go through the micro-batches of this process, one update.

Legend: N labelled tokens of a micro-batch, D real width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from indraquantum.config import OptimizerSettings
from indraquantum.data.split import Batch, Split
from indraquantum.errors import TrainingStopped
from indraquantum.kernels.onednn import onednn_products
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.readout import wrapped_phase
from indraquantum.processes import Processes, whole
from indraquantum.teacher.signals import SignalStore
from indraquantum.training.guards import all_finite, require_finite_signals, require_finite_weights
from indraquantum.training.parallel import Alone, PassResult, idle
from indraquantum.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class StepResult:
    """What one step brought: the objective's terms averaged over its labelled tokens, and how the update went."""

    tokens: int  # real tokens, labelled or not
    grad_norm: float | None  # before clipping; None where float16 overflowed, the update is left out then
    terms: dict[str, float | None]  # loss, ce, kd, kd_estimate, phase, magnitude; None where absent
    readout: dict[str, float | None]  # mean and standard deviation of magnitude and phase


def set_learning_rates(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    step: int,
    total_steps: int,
    planned_steps: int | None = None,
) -> float:
    """Give each parameter group its rate at `step`, a multiple of the base rate, which is returned."""
    base = settings.learning_rate * learning_rate_factor(
        step,
        total_steps,
        settings.warmup_fraction,
        settings.schedule,
        settings.decay_fraction,
        settings.final_rate,
        planned_steps,
    )
    set_base_rate(optimizer, settings, base)
    return base


def set_base_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, base: float) -> None:
    """Give each parameter group its multiple of `base`; the table's is that of `settings`, which a stage may state."""
    for group in optimizer.param_groups:
        rate = settings.table_rate if group.get("name") == "table" else group["rate"]
        group["lr"] = base * rate


@onednn_products()
def optimizer_step(
    parallel: Alone,
    objective: SemanticDistillationLoss,
    optimizer: torch.optim.Optimizer,
    split: Split,
    rows: np.ndarray,
    signals: SignalStore | None,
    *,
    micro_batch_rows: int,
    max_grad_norm: float,
) -> StepResult:
    """Accumulate the gradients of `rows` over all processes and update the weights once.

    The lifted table collects its gradient over the micro-batches, which then goes back through the projector once.
    Every term is divided by the labelled tokens of the whole step.

    Args:
        parallel: the model, in the hands of one process or several.
        objective: the loss, with the weights of this step.
        optimizer: of the model's weights.
        split: where the rows are.
        rows: those of the whole step; each process takes its share.
        signals: the teacher's, or None.
        micro_batch_rows: rows in one forward pass.
        max_grad_norm: gradients are clipped to this norm.

    Raises:
        TrainingStopped: a weight, signal, loss or gradient is not finite; the weights are left as they were.
    """
    processes, own = parallel.processes, parallel.processes.share(rows)
    with processes.together():
        require_finite_weights(optimizer.param_groups)
        work = [_work(split, own[i : i + micro_batch_rows], signals) for i in range(0, len(own), micro_batch_rows)]
    # All take part equally often, for FSDP2 gathers the weights in each pass.
    most = math.ceil(math.ceil(len(rows) / processes.world) / micro_batch_rows)
    work += [_work(split, rows[:1], signals, count_nothing=True)] * (most - len(work))
    tokens, labelled = processes.sums([sum(w.tokens for w in work), sum(w.labelled for w in work)])
    token_count = max(1, int(labelled))
    optimizer.zero_grad(set_to_none=True)
    totals = _Totals()
    for result in _passes(parallel, objective, work, token_count):
        totals.add(result)
    terms, readout = totals.over(processes)
    parallel.precision.scaler.unscale_(optimizer)
    grad_norm = clip_gradients(optimizer, max_grad_norm)
    if not (math.isfinite(terms["loss"]) and (math.isfinite(grad_norm) or parallel.precision.may_overflow)):
        guilty = _guilty_rows(parallel, objective, optimizer, split, rows, signals, token_count)
        found = f"loss {terms['loss']}, gradient norm {grad_norm}: not finite by rows {guilty}"
        raise TrainingStopped(f"{found}; the weights were not updated")
    parallel.precision.scaler.step(optimizer)  # leaves the weights alone where a gradient overflowed
    parallel.precision.scaler.update()
    grad_norm = grad_norm if math.isfinite(grad_norm) else None
    return StepResult(tokens=int(tokens), grad_norm=grad_norm, terms=terms, readout=readout)


def _passes(
    parallel: Alone, objective: SemanticDistillationLoss, work: list[_Work], token_count: int
) -> Iterator[PassResult]:
    """Forward and backward of each micro-batch; with the last one the gradients are those of all processes."""
    leaf_VD = parallel.lifted_leaf() if len(work) > 1 else None
    for part in work[:-1]:
        with parallel.part(last=False):
            teacher = _on(parallel.device, part.teacher)
            yield _backward(parallel, parallel.run_pass(part.batch, teacher, objective, token_count, leaf_VD))
    with parallel.part(last=True):
        teacher = _on(parallel.device, work[-1].teacher)
        collected_VD = None if leaf_VD is None else leaf_VD.grad
        result = parallel.run_pass(work[-1].batch, teacher, objective, token_count, None, collected_VD)
        yield _backward(parallel, result)


def _backward(parallel: Alone, result: PassResult) -> PassResult:
    parallel.precision.scaler.scale(result.terms.total).backward()
    return result


class _Work(NamedTuple):
    """A micro-batch and what the teacher says at its labelled positions, on the CPU."""

    batch: Batch
    teacher: TeacherSignals | None
    tokens: int  # real ones
    labelled: int


def _work(split: Split, rows: np.ndarray, signals: SignalStore | None, *, count_nothing: bool = False) -> _Work:
    """The micro-batch of `rows`, or one of the same shape in which nothing counts."""
    batch = split.batch(rows)
    if count_nothing:
        batch = idle(batch)
    labelled = batch.labels >= 0
    teacher = teacher_signals(signals, batch.index[labelled], torch.device("cpu"))
    require_finite_signals(teacher, rows[np.nonzero(labelled)[0]].tolist())
    return _Work(batch, teacher, tokens=int((batch.index >= 0).sum()), labelled=int(labelled.sum()))


def clip_gradients(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Scale the gradients down to `max_grad_norm` together; their norm before that, over all shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm, foreach=True)
    return norm.item()


def _guilty_rows(
    parallel: Alone,
    objective: SemanticDistillationLoss,
    optimizer: torch.optim.Optimizer,
    split: Split,
    rows: np.ndarray,
    signals: SignalStore | None,
    token_count: int,
) -> list[int]:
    """The rows whose loss or gradient alone is not finite; all where none is so alone, or where weights are sharded."""
    guilty = []
    for row in parallel.processes.share(rows) if parallel.rows_stand_alone else ():
        optimizer.zero_grad(set_to_none=True)
        work = _work(split, np.array([row]), signals)
        with parallel.part(last=False):  # nothing is reduced
            teacher = _on(parallel.device, work.teacher)
            result = _backward(parallel, parallel.run_pass(work.batch, teacher, objective, token_count))
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if not all_finite(result.terms.total.item(), gradients):
            guilty.append(int(row))
    return sorted(row for found in parallel.processes.gather(guilty) for row in found) or rows.tolist()


def teacher_signals(signals: SignalStore | None, index_N: np.ndarray, device: torch.device) -> TeacherSignals | None:
    """The teacher's signals at training positions `index_N` on `device`; None without signals."""
    if signals is None:
        return None
    found = signals.batch("train", index_N)
    return TeacherSignals(*(None if part is None else part.to(device) for part in found))


def _on(device: torch.device, teacher: TeacherSignals | None) -> TeacherSignals | None:
    if teacher is None:
        return None
    return TeacherSignals(*(None if part is None else part.to(device) for part in teacher))


TERMS = ("loss", "ce", "kd", "kd_estimate", "phase", "magnitude")


class _Totals:
    """Sums over the micro-batches: of the terms, and of the readouts' first two moments."""

    def __init__(self) -> None:
        self.terms: dict[str, float] = {}
        self.moments = [0.0] * 5  # positions; magnitudes, their squares; phases, their squares

    def add(self, result: PassResult) -> None:
        """Take in one micro-batch."""
        for name in TERMS:
            value = result.terms.total if name == "loss" else getattr(result.terms, name)
            if value is not None:
                self.terms[name] = self.terms.get(name, 0.0) + value.item()
        if result.amplitude_N is not None:
            magnitude_N = result.amplitude_N.abs().cpu().double()  # MPS has no float64
            phase_N = wrapped_phase(result.amplitude_N.angle()).cpu().double()
            sums = [part.sum().item() for x_N in (magnitude_N, phase_N) for part in (x_N, x_N.square())]
            self.moments = [a + b for a, b in zip(self.moments, [len(magnitude_N), *sums], strict=True)]

    def over(self, processes: Processes) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Terms and readout statistics of the whole step."""
        sums = processes.sums([*self.terms.values(), *self.moments])
        terms = dict(zip(self.terms, sums, strict=False))
        count, *moments = sums[len(self.terms) :]
        readout = dict.fromkeys(("magnitude_mean", "magnitude_std", "phase_mean", "phase_std"))
        if count:
            for name, (first, second) in zip(("magnitude", "phase"), (moments[:2], moments[2:]), strict=True):
                mean = first / count
                readout |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(0.0, second / count - mean**2))}
        return {name: terms.get(name) for name in TERMS}, readout
