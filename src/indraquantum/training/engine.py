"""The engine of all training: it does one optimiser step of any learner, in one process or several.

    engine = Engine(SingleProcess(model), optimizer)
    result = engine.step(plan.step(n))

`indra train`, `teacher`, `lr-test`, `train --dry-run` and the benchmarks all use it.

Legend: N labelled tokens of a micro-batch, D real width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from indraquantum.data.split import Batch
from indraquantum.errors import TrainingStopped
from indraquantum.kernels.arguments import Head
from indraquantum.kernels.onednn import onednn_products
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.readout import wrapped_phase
from indraquantum.processes import Processes, is_sharded, whole
from indraquantum.training.candidates import Candidates, CandidateSampler
from indraquantum.training.guards import all_finite, require_finite_signals, require_finite_weights
from indraquantum.training.parallel import PassResult, SingleProcess, idle
from indraquantum.training.step import REPORTED_TERMS, StepInput, StepResult

# cuBLAS gives equal bits only with a workspace of a fixed size (https://docs.nvidia.com/cuda/cublas/, "Results
# Reproducibility"). torch reads the size when it first multiplies on a GPU, which may be long before the first step,
# when a teacher is captured. So it is set when this module is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, equal inputs give equal bits on `device`, a CPU or a CUDA device. torch promises nothing for MPS.

    On CUDA, torch then takes only deterministic algorithms, and raises RuntimeError for an operator without one. The
    rest of the program needs other operators, such as running sums of floats, so this is for training steps only.
    """
    if device.type != "cuda":
        with onednn_products(device):
            yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all new memory is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


class Engine:
    """A model in one process or several, and its optimiser.

    Args:
        parallel: the model and the processes that share its work.
        optimizer: the optimiser of the weights. A group may have a `name` and a `rate`, its multiple of the base rate.
        head: how logits are made from states and table; see `SemanticDistillationLoss`.
        sampler: chooses the tokens that a step compares; None compares all.
    """

    def __init__(
        self,
        parallel: SingleProcess,
        optimizer: torch.optim.Optimizer,
        head: Head = "interference",
        sampler: CandidateSampler | None = None,
    ) -> None:
        self.parallel, self.optimizer, self.head, self.sampler = parallel, optimizer, head, sampler

    def objective(self, step: StepInput) -> SemanticDistillationLoss:
        """Return the objective of `step`."""
        return SemanticDistillationLoss(
            step.kd_weight,
            step.phase_weight,
            step.magnitude_weight,
            step.temperature,
            tail=step.tail,
            head=self.head,
        )

    def step(self, step: StepInput) -> StepResult:
        """Accumulate the gradients of the step's rows over all processes and update the weights once.

        The lifted table collects its gradient over the micro-batches. Then this gradient goes back through the
        projector once. Every term is divided by the number of labelled tokens in the whole step.

        Raises:
            TrainingStopped: a weight, signal, loss or gradient is not finite; the weights are not changed.
        """
        with repeatable(self.parallel.device):
            return self._step(step)

    def _step(self, step: StepInput) -> StepResult:
        parallel, optimizer, objective = self.parallel, self.optimizer, self.objective(step)
        processes, own = parallel.processes, parallel.processes.share(step.rows)
        self._set_learning_rates(step)
        # Dropout is the only randomness of a step. Each step and process has its own seed, so resuming is exact
        # without any saved state.
        torch.manual_seed((step.seed * processes.world + processes.rank) % 2**64)
        with processes.together():
            require_finite_weights(optimizer.param_groups)
            size = step.micro_batch_rows
            work = [_work(step, own[i : i + size]) for i in range(0, len(own), size)]
        # All processes do the same number of passes, because FSDP2 gathers the weights in each pass.
        most = math.ceil(math.ceil(len(step.rows) / processes.world) / size)
        work += [_work(step, step.rows[:1], count_nothing=True)] * (most - len(work))
        candidates = self._candidates(step, work)
        tokens, labelled = processes.sums([sum(w.tokens for w in work), sum(w.labelled for w in work)])
        token_count = max(1, int(labelled))
        optimizer.zero_grad(set_to_none=True)
        totals = _Totals()
        for result in _passes(parallel, objective, work, token_count, candidates):
            totals.add(result)
        terms, readout = totals.over(processes)
        parallel.precision.scaler.unscale_(optimizer)
        grad_norm = clip_gradients(optimizer, step.max_grad_norm)
        if not (math.isfinite(terms["loss"]) and (math.isfinite(grad_norm) or parallel.precision.may_overflow)):
            guilty = self._guilty_rows(step, objective, token_count, candidates)
            found = f"loss {terms['loss']}, gradient norm {grad_norm}: not finite because of rows {guilty}"
            raise TrainingStopped(f"{found}; the weights were not updated")
        parallel.precision.scaler.step(optimizer)  # does not change the weights if a gradient overflowed
        parallel.precision.scaler.update()
        grad_norm = grad_norm if math.isfinite(grad_norm) else None
        return StepResult(tokens=int(tokens), grad_norm=grad_norm, terms=terms, readout=readout)

    def _set_learning_rates(self, step: StepInput) -> None:
        """Set the learning rate of each parameter group to its multiple of the base rate."""
        for group in self.optimizer.param_groups:
            rate = step.table_rate if group.get("name") == "table" else group.get("rate", 1.0)
            group["lr"] = step.learning_rate * rate

    def compared(self, step: StepInput) -> int | None:
        """Return how many tokens `step` compares in a single process; None compares all."""
        candidates = self._candidates(step, [_work(step, step.rows)])
        return None if candidates is None else len(candidates.ids_R)

    def _candidates(self, step: StepInput, work: list[_Work]) -> Candidates | None:
        """Return the tokens that the step compares, the same in all processes; None compares all."""
        if self.sampler is None or (step.signals is not None and (step.temperature != 1 or step.tail == "uniform")):
            return None
        own = [part.batch.labels for part in work]
        own += [part.teacher.ids_NK.numpy() for part in work if part.teacher is not None]
        named = self.parallel.processes.gather(np.unique(np.concatenate([ids.reshape(-1) for ids in own])))
        return self.sampler.of_step(step.seed, named).to(self.parallel.device)

    def _guilty_rows(
        self, step: StepInput, objective: SemanticDistillationLoss, token_count: int, candidates: Candidates | None
    ) -> list[int]:
        """Return the rows whose own loss or gradient is not finite. If none is, or weights are sharded: all rows."""
        guilty, parallel = [], self.parallel
        for row in parallel.processes.share(step.rows) if parallel.rows_stand_alone else ():
            self.optimizer.zero_grad(set_to_none=True)
            work = _work(step, np.array([row]))
            with parallel.part(last=False):  # nothing is reduced
                # Not `run_pass`: DDP would wait for the buffers of a process that has no row.
                found = parallel.bare(work.batch, work.teacher, objective, token_count, candidates=candidates)
                result = _backward(parallel, found)
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
            if not all_finite(result.terms.total.item(), gradients):
                guilty.append(int(row))
        return sorted(row for found in parallel.processes.gather(guilty) for row in found) or step.rows.tolist()


def _passes(
    parallel: SingleProcess,
    objective: SemanticDistillationLoss,
    work: list[_Work],
    token_count: int,
    candidates: Candidates | None,
) -> Iterator[PassResult]:
    """Do forward and backward of each micro-batch. After the last, the gradients are sums over all processes."""
    leaf_VD = parallel.lifted_leaf(candidates) if len(work) > 1 else None
    for part in work[:-1]:
        with parallel.part(last=False):
            result = parallel.run_pass(part.batch, part.teacher, objective, token_count, leaf_VD, None, candidates)
            yield _backward(parallel, result)
    with parallel.part(last=True):
        collected_VD = None if leaf_VD is None else leaf_VD.grad
        last = work[-1]
        result = parallel.run_pass(last.batch, last.teacher, objective, token_count, None, collected_VD, candidates)
        yield _backward(parallel, result)


def _backward(parallel: SingleProcess, result: PassResult) -> PassResult:
    parallel.precision.scaler.scale(result.terms.total).backward()
    return result


class _Work(NamedTuple):
    """A micro-batch and the teacher's signals at its labelled positions, on the CPU."""

    batch: Batch
    teacher: TeacherSignals | None
    tokens: int  # real tokens
    labelled: int


def _work(step: StepInput, rows: np.ndarray, *, count_nothing: bool = False) -> _Work:
    """Return the micro-batch of `rows`, or with `count_nothing` one of the same shape in which no token counts."""
    batch = step.split.batch(rows)
    if count_nothing:
        batch = idle(batch)
    labelled = batch.labelled
    teacher = None if step.signals is None else step.signals.batch("train", batch.index[labelled])
    require_finite_signals(teacher, rows[np.nonzero(labelled)[0]].tolist())
    return _Work(batch, teacher, tokens=int((batch.index >= 0).sum()), labelled=int(labelled.sum()))


def clip_gradients(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Scale all gradients down to the norm `max_grad_norm`. Return their norm before that, over all shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # None takes operators for lists of tensors where the device has them, which MPS does not, but never for shards.
    foreach = True if any(map(is_sharded, gradients)) else None
    norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=foreach))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm, foreach=foreach)
    return norm.item()


class _Totals:
    """Sums over the micro-batches: the terms, and what the statistics of the readouts are made of."""

    def __init__(self) -> None:
        self.terms: dict[str, float] = {}
        self.moments = [0.0] * 7  # positions; magnitudes, their squares; phases, their squares, cosines and sines

    def add(self, result: PassResult) -> None:
        """Add one micro-batch."""
        for name in REPORTED_TERMS:
            value = result.terms.total if name == "loss" else getattr(result.terms, name)
            if value is not None:
                self.terms[name] = self.terms.get(name, 0.0) + value.item()
        if result.amplitude_N is not None:
            magnitude_N = result.amplitude_N.abs().cpu().double()  # MPS has no float64
            phase_N = wrapped_phase(result.amplitude_N.angle()).cpu().double()
            parts = (magnitude_N, magnitude_N.square(), phase_N, phase_N.square(), phase_N.cos(), phase_N.sin())
            sums = [part.sum().item() for part in parts]
            self.moments = [a + b for a, b in zip(self.moments, [len(magnitude_N), *sums], strict=True)]

    def over(self, processes: Processes) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Return the terms and the readout statistics of the whole step."""
        sums = processes.sums([*self.terms.values(), *self.moments])
        terms = dict(zip(self.terms, sums, strict=False))
        count, *moments = sums[len(self.terms) :]
        readout = dict.fromkeys(
            ("magnitude_mean", "magnitude_std", "phase_mean", "phase_std", "phase_circular_variance")
        )
        if count:
            for name, (first, second) in zip(("magnitude", "phase"), (moments[:2], moments[2:4]), strict=True):
                mean = first / count
                readout |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(0.0, second / count - mean**2))}
            readout["phase_circular_variance"] = 1 - math.hypot(*moments[4:]) / count
        return {name: terms.get(name) for name in REPORTED_TERMS}, readout
