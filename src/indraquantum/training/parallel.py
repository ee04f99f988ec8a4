"""A model in training: its number format, the average of its weights, and the processes that share its work.

Weights, lifted table, objective, optimiser and held-out figures are float32 in every number format.

DDP and FSDP2 reduce gradients in hooks of a module's forward and backward. A step calls the model several times on one
lifted table, so we wrap a whole pass as the module (`MicroBatchPass`). Each micro-batch has one forward and one
backward, and the reduction comes with the last one. This is the documented way to accumulate gradients, and the
reduction overlaps with the backward. Reducing gradients by hand after the step would take fewer lines, but could not
shard the weights and would not overlap.

Gradients are summed, not averaged, because each term is already divided by the labelled tokens of the whole step. So
processes may have shares of different sizes. A process without any row takes part with an `idle` batch.

Legend: B rows, T positions, N labelled tokens of a micro-batch, D real width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from indraquantum.config import PrecisionSettings
from indraquantum.data.split import Batch
from indraquantum.device import best_16_bits
from indraquantum.errors import UserError
from indraquantum.kernels.onednn import has_16_bit_units, note_slow_16_bits
from indraquantum.learner import Learner, labelled_positions, to_tensors
from indraquantum.loss_v2 import LossTerms, SemanticDistillationLoss, TeacherSignals
from indraquantum.model.attention import Attention
from indraquantum.processes import ALONE, Processes, shard_like
from indraquantum.training.candidates import Candidates

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """A number format on a device, and its loss scale, which only float16 uses.

    `objective` is the format of the objective's matrix products: bfloat16 if the layers use it, else float32. The range
    of float16 is too small for it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.objective = dtype if dtype is torch.bfloat16 else torch.float32
        self.attention: Attention = "layers"
        self._device_type = "cpu" if device is None else device.type
        self.use(dtype)

    def use(self, dtype: torch.dtype) -> None:
        """Compute the layers in `dtype` from now on, with a new loss scale if it needs one."""
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, the layers compute their matrix products in this format."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, self.dtype)

    @property
    def name(self) -> str:
        """The name, as a value of `--precision`."""
        return _name(self.dtype)

    @property
    def name_of_objective(self) -> str:
        """The format of the objective's products."""
        return _name(self.objective)

    @property
    def may_overflow(self) -> bool:
        """Whether the loss scale may be the reason for gradients that are not finite. It is then halved, down to 1."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)


def choose_precision(settings: PrecisionSettings, device: torch.device) -> Precision:
    """Return the format of `settings`. auto takes 16 bits where the device supports them, else float32.

    If other settings ask for 16 bits on a CPU without units for them, a note says how slow that is.
    """
    if settings.precision != "auto":
        note_slow_16_bits(device, settings.precision)
        return Precision(DTYPES[settings.precision], device)
    if device.type == "cuda":
        return Precision(best_16_bits(), device)
    has_units = device.type == "cpu" and has_16_bit_units()
    return Precision(torch.bfloat16 if has_units else torch.float32, device)


class WeightAverage:
    """An exponential moving average of a model's trainable weights. With a decay of 0 it is empty and does nothing.

    Args:
        model: whose weights to average, as it stands at its first step.
        decay: part of the average that stays at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and decay}
        self.weights = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after `step` steps. The first steps count for more, so that the initial weights fade."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(model.get_parameter(name), 1 - decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Restore the average from a checkpoint of the same run."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Inside, the weights of `model` are the average. Nothing may interrupt the exchange at entry and exit."""
        own = {name: model.get_parameter(name).detach().clone() for name in self.weights}
        _fill(model, self.weights)
        try:
            yield
        finally:
            _fill(model, own)


@torch.no_grad()
def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


class PassResult(NamedTuple):
    """The result of the pass of one micro-batch."""

    terms: LossTerms  # its `total` carries the gradient
    amplitude_N: Tensor | None  # complex readouts, detached; None if the model has none


class MicroBatchPass(nn.Module):
    """The objective on one micro-batch, from rows to terms."""

    def __init__(self, learner: Learner, precision: Precision) -> None:
        super().__init__()
        self.learner, self.precision = learner, precision

    def lift_table(self, candidates: Candidates | None = None) -> Tensor:
        """Return the lifted table of the learner: (V, D), or (R, D) of the candidates."""
        return self.learner.lift_table() if candidates is None else self.learner.lift_table(candidates.ids_R)

    def forward(
        self,
        batch: Batch,
        teacher: TeacherSignals | None,
        objective: SemanticDistillationLoss,
        token_count: int,
        leaf_VD: Tensor | None = None,
        collected_VD: Tensor | None = None,
        candidates: Candidates | None = None,
    ) -> PassResult:
        """Compute the terms of `batch`.

        Args:
            batch: rows.
            teacher: signals at the labelled positions of `batch`, on any device.
            objective: the loss.
            token_count: labelled tokens of the whole step, in all processes.
            leaf_VD: (V, D) the lifted table as a leaf that collects its gradient; None lifts the table here, so that
                its gradient reaches the projector.
            collected_VD: (V, D) what a leaf has collected before; goes through the projector too.
            candidates: the R tokens to compare, on the model's device; None compares all V. With candidates, R takes
                the place of V in the tables above.
        """
        table_VD = self.lift_table(candidates) if leaf_VD is None else leaf_VD
        if collected_VD is not None:
            table_VD = table_VD.view_as(table_VD)  # without a projector it is the weight itself, whose hooks must stay
            table_VD.register_hook(lambda gradient_VD: gradient_VD + collected_VD)
        with self.precision.autocast():
            inputs, whole_VD = to_tensors(batch, table_VD.device), table_VD if candidates is None else None
            states_BTD = self.learner.hidden_states(**inputs, table_VD=whole_VD)
        states_ND, labels_N = labelled_positions(states_BTD, batch)
        teacher = None if teacher is None else teacher.to(table_VD.device)
        amplitude_N = self.learner.amplitude(states_ND)
        states_ND = states_ND.to(self.precision.objective)
        bias_V, scale, size = self.learner.bias_V, self.learner.scale, None
        if candidates is not None:
            size, bias_V, labels_N = len(candidates.place_V), candidates.bias_R(bias_V), candidates.places(labels_N)
            teacher = teacher and teacher._replace(ids_NK=candidates.places(teacher.ids_NK))
        terms = objective(
            states_ND, table_VD, labels_N, bias_V, scale, teacher, amplitude_N,
            token_count=token_count, vocabulary_size=size,
        )  # fmt: skip
        return PassResult(terms, None if amplitude_N is None else amplitude_N.detach())


class WholeState(NamedTuple):
    """The part of a checkpoint that depends on the model, as one process has it."""

    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]


def idle(batch: Batch) -> Batch:
    """Return `batch` without any token that counts, for a process that has no row."""
    return batch._replace(labels=np.full_like(batch.labels, -100), index=np.full_like(batch.index, -1))


class SingleProcess:
    """A model in one process, which shares nothing."""

    rows_stand_alone = True  # whether one process may compute a row without the others

    def __init__(self, learner: Learner, processes: Processes = ALONE, precision: Precision | None = None) -> None:
        self.processes, self.precision = processes, precision or Precision()
        self.device = next(learner.parameters()).device
        self.learner = learner
        self.bare = MicroBatchPass(learner, self.precision)
        self.run_pass: nn.Module = self.bare

    def lifted_leaf(self, candidates: Candidates | None = None) -> Tensor:
        """Return the lifted table, of the candidates if there are any, as a leaf that collects gradients."""
        with torch.no_grad():
            return self.bare.lift_table(candidates).detach().requires_grad_()

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """Wrap forward and backward of one micro-batch. With the last, the gradients of all processes are summed."""
        return contextlib.nullcontext()

    def readable(self) -> AbstractContextManager[None]:
        """Inside, all weights of the model can be used outside of a step. All processes must enter it together."""
        return contextlib.nullcontext()

    def whole_state(self, optimizer: torch.optim.Optimizer, average: WeightAverage) -> WholeState:
        """Return the state for a checkpoint, in the first process. All processes must call this together."""
        return WholeState(self.learner.state_dict(), average.weights, optimizer.state_dict())


class DataParallel(SingleProcess):
    """DDP: each process holds the whole model."""

    def __init__(self, learner: Learner, processes: Processes, precision: Precision, *, unused: bool) -> None:
        super().__init__(learner, processes, precision)
        self.run_pass = nn.parallel.DistributedDataParallel(self.bare, find_unused_parameters=unused)
        self.run_pass.register_comm_hook(None, _sum_bucket)

    def part(self, *, last: bool) -> AbstractContextManager[None]:
        """As in `SingleProcess`."""
        return contextlib.nullcontext() if last else self.run_pass.no_sync()


def _sum_bucket(_, bucket):  # DDP refuses annotations that are strings, as they are in this file
    """DDP's own all-reduce without its division by the number of processes."""
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class FullyShardedParallel(SingleProcess):
    """FSDP2: weights, gradients and optimiser state are sharded, and each layer is gathered when it is needed."""

    rows_stand_alone = False

    def __init__(self, learner: Learner, processes: Processes, precision: Precision, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        super().__init__(learner, processes, precision)
        self.device = device
        mesh = init_device_mesh(device.type, (processes.world,))
        for layer in learner.backbone.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.bare, mesh=mesh)
        register_fsdp_forward_method(self.bare, "lift_table")
        for module in self.bare.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.lifted_leaf()  # the first call decides which module is the root
        self.bare.reshard()

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """As in `SingleProcess`."""
        self.bare.set_requires_gradient_sync(last)
        yield

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """As in `SingleProcess`. The layers are gathered when they are needed."""
        self.bare.unshard()
        try:
            yield
        finally:
            self.bare.reshard()

    def whole_state(self, optimizer: torch.optim.Optimizer, average: WeightAverage) -> WholeState:
        """As in `SingleProcess`. The first process gathers each tensor on its CPU; the others get {}."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        learner, options = self.learner, StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(learner, options=options)
        averaged = {}
        if average.weights:
            with average.in_place_of(learner):
                found = get_model_state_dict(learner, options=options)
            averaged = {name: value for name, value in found.items() if name in average.weights}
        state = get_optimizer_state_dict(learner, optimizer, options=options)
        return WholeState(weights, averaged, _numbered(state) if self.processes.is_first else {})


def make_parallel(
    kind: Literal["auto", "ddp", "fsdp2"],
    learner: Learner,
    processes: Processes,
    device: torch.device,
    *,
    unused: bool,
    precision: Precision | None = None,
) -> SingleProcess:
    """Share `learner` among `processes`. Make its optimiser after this, because the weights may become shards.

    Args:
        kind: auto takes DDP; one process needs neither.
        learner: on the CPU or on `device`, with the same weights in each process. Unless it is sharded, it is moved to
            `device` as a whole. FSDP2 moves one layer at a time, because a device may be too small for all of them.
        processes: those of the run.
        device: this process's.
        unused: some weights get no gradient.
        precision: of the layers; float32 by default.

    Raises:
        UserError: FSDP2 is to work with a loss scale.
    """
    if processes.alone:
        return SingleProcess(learner.to(device), precision=precision)
    precision = precision or Precision()
    if kind == "fsdp2" and precision.scaler.is_enabled():
        # Each process would see only the overflow of its own shards.
        raise UserError("--precision", "float16", "must be float32 or bfloat16 with --parallel fsdp2")
    if kind == "fsdp2":
        return FullyShardedParallel(learner, processes, precision, device)
    return DataParallel(learner.to(device), processes, precision, unused=unused)


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state_dict with numbers of parameters, as in torch.optim, instead of their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: place for place, name in enumerate(names)}
    groups = [group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: entry for name, entry in state["state"].items()}, "param_groups": groups}


# Under FSDP2, torch.distributed.checkpoint gathers the state to save, but we do not load with it. Its
# `set_optimizer_state_dict` does a step with zeros to make the states. It would need a list of the parameters without a
# state, such as a readout that no teacher has trained, and it can't load averaged weights. So each process cuts its
# shards out of the file that it verified.
def scattered(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's shards of `state`, with the layout of the tensors of the same name in `like`."""
    return {name: shard_like(value, like[name]) if name in like else value for name, value in state.items()}


def scattered_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimiser's state_dict, in which each tensor of a parameter's shape is sharded like the parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {
            name: shard_like(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": shards}
