"""Shows the cost of a run before it begins: the command `indra train --dry-run`.

The counts are exact. The times come from a few real steps, whose results are discarded. Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from indraquantum.config import TrainSettings
from indraquantum.learner import to_tensors
from indraquantum.model.exports import exports_of
from indraquantum.progress import duration
from indraquantum.training.earlier import with_former_shape
from indraquantum.training.loop import take_step
from indraquantum.training.plan import RunStage
from indraquantum.training.run import Run, trial_run
from indraquantum.trials.budget import (
    evaluation_seconds,
    expectation,
    expected_loss,
    real_tokens_per_step,
    within_minutes,
)
from indraquantum.trials.costs import StepSize, objective_bytes, parameter_counts, step_flops

MEASURED_STEPS = 2  # in each stage: the first one is the warm-up, and the last one is measured


@dataclass(frozen=True)
class DryRun:
    """The work and cost of a run."""

    size: StepSize  # of the first step
    micro_batch_rows: int
    step_tokens: int  # real tokens of the first step
    total_steps: int
    stages: tuple[str, ...]  # lines about each stage and some of its steps
    tensors: dict[str, tuple[tuple[int, ...], ...]]  # parameter shapes of each part
    parameters: dict[str, int]
    bytes: dict[str, int]
    flops: dict[str, int]  # of one optimiser step
    seconds_per_step: float  # of the first stage
    exports: str  # what `indra export --as` can write
    seconds_to_finish: float  # all steps and evaluations; no checkpoint, no capture
    expected_loss: float | None  # held-out nats per token of such a run on WikiText and Alpaca, if it was measured


def dry_run(settings: TrainSettings) -> DryRun:
    """Build the run of `settings`, do a few steps, and print its cost. Nothing is saved.

    Raises:
        UserError: settings, data or signals don't fit.
        OutOfMemory: a step or an evaluation does not fit into the memory of the device.
    """
    run = trial_run(within_minutes(with_former_shape(settings)), counts_text=False, may_resume=True)
    found = measure(run)
    print(report(found))
    return found


def measure(run: Run) -> DryRun:
    """Count and time the work of `run`, which is at its first step."""
    step = run.plan.step(0)
    batch = step.split.batch(step.rows)
    size = StepSize(len(step.rows), step.split.row_length, int(batch.labelled.sum()), run.engine.compared(step))
    activations = activation_bytes(run, step.rows[: step.micro_batch_rows])
    seconds = [_step_seconds(run, stage) for stage in run.plan.stages]
    steps_seconds = sum(stage.steps * own for stage, own in zip(run.plan.stages, seconds, strict=True))
    tokens = round(sum(stage.steps * real_tokens_per_step(stage) for stage in run.plan.stages))
    return DryRun(
        size=size,
        micro_batch_rows=step.micro_batch_rows,
        step_tokens=int((batch.index >= 0).sum()),
        total_steps=run.total_steps,
        stages=tuple(line for stage in run.plan.stages for line in _lines_of(stage)),
        tensors=_shapes(run),
        parameters=parameter_counts(run.model),
        bytes=_memory(run, size, activations),
        flops=step_flops(run.model, size),
        seconds_per_step=seconds[0],
        exports=exports_of(run.model.config),
        seconds_to_finish=steps_seconds + _evaluations(run) * evaluation_seconds(run),
        expected_loss=expected_loss(run, tokens),
    )


def _lines_of(stage: RunStage) -> list[str]:
    """Return lines about the stage and its first, middle and last step."""
    numbers = dict.fromkeys((stage.first, stage.first + stage.steps // 2, stage.end - 1))
    return [str(stage), *(f"  step {number + 1:,}: {stage.step(number)}" for number in numbers)]


def _step_seconds(run: Run, stage: RunStage) -> float:
    """Return the seconds that the first step of `stage` takes."""
    for _ in range(MEASURED_STEPS):
        run.step = stage.first
        started = time.perf_counter()
        take_step(run)
        seconds = time.perf_counter() - started
    return seconds


def activation_bytes(run: Run, rows: np.ndarray) -> int:
    """Return the bytes that a forward pass over `rows` keeps for the backward pass, besides weights and table."""
    model, kept = run.model, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    table_VD = model.lift_table().detach().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with run.step_fits(), hooks, run.parallel.precision.autocast():
        inputs = to_tensors(run.plan.at(0).train.batch(rows), run.device)
        states_BTD = model.hidden_states(**inputs, table_VD=table_VD)
    kept[states_BTD.untyped_storage().data_ptr()] = states_BTD.untyped_storage().nbytes()
    for tensor in (*model.parameters(), table_VD):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def _memory(run: Run, size: StepSize, activations: int) -> dict[str, int]:
    """Return the bytes for each purpose. Those of the optimiser are what it holds after a step."""
    model = run.model
    state = [value for values in run.optimizer.state_dict()["state"].values() for value in values.values()]
    lifted = (size.compared or model.config.vocab_size) * model.config.hidden_size * torch.float32.itemsize
    parts = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "optimiser": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        "averaged weights": sum(weight.nbytes for weight in run.average.weights.values()),
        "lifted table and its gradients": 3 * lifted,
        "activations": activations,
        "objective's buffer": objective_bytes(model, size, run.device),
    }
    return {**parts, "all": sum(parts.values())}


def _evaluations(run: Run) -> int:
    """Return how often the run is evaluated: at its start and end, at the end of each epoch, and in between."""
    ends = {run.plan.step_of_epoch(epoch) for epoch in range(1, run.plan.epoch_of(run.total_steps) + 1)}
    return len({*range(0, run.total_steps, run.settings.evaluate_every), run.total_steps, *ends})


def _shapes(run: Run) -> dict[str, tuple[tuple[int, ...], ...]]:
    parts: dict[str, list[tuple[int, ...]]] = {}
    for name, parameter in run.model.named_parameters():
        parts.setdefault(name.split(".")[0], []).append(tuple(parameter.shape))
    return {part: tuple(dict.fromkeys(shapes)) for part, shapes in parts.items()}


def report(found: DryRun) -> str:
    """Return the figures as plain lines."""
    size, pieces = found.size, math.ceil(found.size.rows / found.micro_batch_rows)
    lines = [
        f"step: {size.rows:,} rows of {size.row_length:,} in {pieces:,} micro-batches, "
        f"{found.step_tokens:,} real tokens, {size.labelled:,} with a label; {found.total_steps:,} steps",
        *([] if size.compared is None else [f"softmax: sampled, a step compares about {size.compared:,} tokens"]),
        *found.stages,
        *(f"{part}: {' '.join(map(_shape, shapes))}" for part, shapes in found.tensors.items()),
        "parameters: " + _parts(found.parameters, lambda count: f"{count:,}"),
        "memory: " + _parts(found.bytes, lambda count: f"{count / 2**20:,.1f} MiB"),
        "FLOPs a step: " + _parts(found.flops, lambda count: f"{count / 1e9:,.3f} G"),
        f"FLOPs a token: {found.flops['all'] / found.step_tokens / 1e6:,.3f} M",
        f"time: {found.seconds_per_step:.3f} s a step ({found.step_tokens / found.seconds_per_step:,.0f} tokens/s), "
        f"about {duration(found.seconds_to_finish)} to finish with evaluations",
        *([] if found.expected_loss is None else [f"held-out loss: {expectation(found.expected_loss)}"]),
        f"exports: {found.exports}",
        "Nothing was written.",
    ]
    return "\n".join(lines)


def _parts(values: Mapping[str, int], show: Callable[[int], str]) -> str:
    parts = ", ".join(f"{name} {show(value)}" for name, value in values.items() if name != "all")
    return f"{show(values['all'])} ({parts})"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
