"""A run and what decides it: its parts, its identity, and how it is put where a checkpoint stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from indraquantum.config import TrainSettings
from indraquantum.data.dataset import PreparedDataset
from indraquantum.errors import UserError
from indraquantum.files import combined_sha256
from indraquantum.loss_v2 import SemanticDistillationLoss
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE, Processes
from indraquantum.teacher.signals import SignalStore
from indraquantum.training.acceleration import accelerate
from indraquantum.training.average import WeightAverage
from indraquantum.training.best import BestHeldOut
from indraquantum.training.checkpoint import (
    Checkpoint,
    Found,
    checkpoint_path,
    checkpoints_in,
    load_checkpoint,
    newest_checkpoint,
    set_aside,
)
from indraquantum.training.collapse_guard import CollapseGuard
from indraquantum.training.optimizers import new_optimizer
from indraquantum.training.parallel import Alone, make_parallel, scattered, scattered_optimizer
from indraquantum.training.precision import choose_precision
from indraquantum.training.schedule import steps_per_epoch

# What may change between two starts of one run without changing what it computes.
FREE_SETTINGS = {
    "output", "logs", "device", "threads", "data", "signals", "teacher", "tokenizer",
    "save_every", "keep_last", "resume", "on_collapse", "dry_run", "parallel", "gradient_checkpointing", "keep_best",
    "log_to",
}  # fmt: skip


@dataclass
class Run:
    """Everything that one run carries from step to step."""

    settings: TrainSettings
    dataset: PreparedDataset
    signals: SignalStore | None
    model: IndraQuantumPhase2
    parallel: Alone  # the model in the hands of this process and the others
    optimizer: torch.optim.Optimizer
    device: torch.device
    objective: SemanticDistillationLoss
    average: WeightAverage
    identity: dict[str, Any]
    total_steps: int
    steps_per_epoch: int
    step: int = 0
    tokens: int = 0
    held_out: dict[str, float] | None = None  # of the last evaluation
    pending: dict[str, Any] | None = None  # metrics of `step` that are not written yet
    best: BestHeldOut = field(default_factory=BestHeldOut)
    guard: CollapseGuard = field(default_factory=CollapseGuard)
    saved: bool = False  # a checkpoint holds the run as it stands

    @property
    def processes(self) -> Processes:
        """Those of the run, seen from here."""
        return self.parallel.processes

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or the run was stopped early."""
        return self.step == self.total_steps or self.best.stopped

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimiser step."""
        return rows_per_step(self.settings.batch_tokens, self.dataset.row_length)

    @property
    def micro_batch_rows(self) -> int:
        """Rows of one forward pass."""
        return rows_per_step(self.settings.micro_batch_tokens, self.dataset.row_length)

    @property
    def epoch_ends(self) -> bool:
        """Whether `step` is the last of an epoch, or of the run."""
        return self.step % self.steps_per_epoch == 0 or self.finished

    @property
    def epoch_path(self) -> Path:
        """Where the checkpoint of the epoch that `step` is in stands."""
        return checkpoint_path(self.settings.output, max(1, math.ceil(self.step / self.steps_per_epoch)))


def start_run(
    settings: TrainSettings,
    dataset: PreparedDataset,
    signals: SignalStore | None,
    device: torch.device,
    processes: Processes = ALONE,
) -> Run:
    """A run at its first step: seeded weights, fresh optimiser; the same in each of `processes`.

    Raises:
        UserError: settings contradict each other, or ask for a compiler where none works.
    """
    tokenizer = dataset.tokenizer
    config = IndraQuantumConfig.from_settings(
        settings,
        vocab_size=tokenizer.vocabulary_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        max_position_embeddings=max(2048, dataset.row_length),
    )
    torch.manual_seed(settings.seed)
    model = IndraQuantumPhase2(config).to(device).train()
    accelerate(model, settings, device)
    # Without signals nothing looks at the readout.
    precision, unused = choose_precision(settings, device), signals is None
    parallel = make_parallel(settings.parallel, model, processes, device, unused=unused, precision=precision)
    per_epoch = steps_per_epoch(dataset.train.num_rows, rows_per_step(settings.batch_tokens, dataset.row_length))
    total_steps = settings.epochs * per_epoch
    distil = signals is not None
    return Run(
        settings=settings,
        dataset=dataset,
        signals=signals,
        model=model,
        parallel=parallel,
        optimizer=new_optimizer(model, settings, sharded=not parallel.rows_stand_alone),
        average=WeightAverage(model, settings.ema_decay),
        device=device,
        objective=SemanticDistillationLoss(
            kd_weight=0.0,  # set at each step by the curriculum
            phase_weight=settings.phase_weight if distil else 0.0,
            magnitude_weight=settings.magnitude_weight if distil else 0.0,
            temperature=signals.manifest.temperature if distil else 1.0,
        ),
        identity=run_identity(settings, dataset, signals),
        total_steps=min(total_steps, settings.max_steps or total_steps),
        steps_per_epoch=per_epoch,
    )


def rows_per_step(batch_tokens: int, row_length: int) -> int:
    """Rows of so many positions; at least one."""
    return max(1, batch_tokens // row_length)


def run_identity(
    settings: TrainSettings, dataset: PreparedDataset, signals: SignalStore | None
) -> dict[str, str | int | float | bool | None]:
    """What decides a run's result, as plain values: its settings and the content of its data and signals."""
    chosen = settings.model_dump(mode="json", exclude=FREE_SETTINGS)
    return {
        **chosen,
        "data": dataset.content_sha256,
        "signals": combined_sha256(entry.sha256 for entry in signals.manifest.shards) if signals else None,
    }


def resume(run: Run) -> bool:
    """Put `run` where the checkpoint that its settings ask for stands; whether there was one.

    Raises:
        UserError: that checkpoint is damaged or of a run with other settings, or the folder should hold none.
    """
    processes, read = run.processes, []

    def choose() -> Path | None:
        read.append(_wanted_checkpoint(run))
        return read[0] and read[0].path

    path = processes.first(choose)
    if path is None:
        return False
    with processes.together():  # the others read and verify the file too
        field = "--output" if run.settings.resume == "auto" else "--resume"
        restore(run, read[0].checkpoint if read else load_checkpoint(field, path))
    processes.first(lambda: _set_later_ones_aside(run, path))
    if not run.finished:
        print(f"Going on from step {run.step} of {run.total_steps}.")
    return True


def _wanted_checkpoint(run: Run) -> Found | None:
    """The checkpoint that the settings ask for, None to start afresh."""
    output, wanted = run.settings.output, run.settings.resume
    if wanted == "never":
        if there := checkpoints_in(output, run.steps_per_epoch):
            raise UserError("--resume", wanted, f"must be auto: {output} holds {there[0][1].name}; or another --output")
        return None
    if wanted == "auto":
        return newest_checkpoint(output, run.steps_per_epoch)
    return Found(Path(wanted), load_checkpoint("--resume", Path(wanted)))


def _set_later_ones_aside(run: Run, used: Path) -> None:
    """After going back on purpose: later checkpoints would be ahead of the metrics."""
    later = (
        path
        for step, path in checkpoints_in(run.settings.output, run.steps_per_epoch)
        if min(step, run.total_steps) > run.step and path.resolve() != used.resolve()
    )
    set_aside(later)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Give `run` the state of `checkpoint`.

    Raises:
        UserError: the checkpoint is of a run with other settings; the first that differs is named.
    """
    for name, value in run.identity.items():
        then = checkpoint.settings.get(name)
        if then != value:
            raise UserError(
                f"--{name.replace('_', '-')}",
                value,
                f"must be {then}, as in the run that {run.settings.output} holds, or give another --output",
            )
    run.model.load_state_dict(scattered(checkpoint.model, run.model.state_dict()))
    run.optimizer.load_state_dict(scattered_optimizer(checkpoint.optimizer, run.optimizer))
    run.step, run.tokens, run.pending, run.saved = checkpoint.step, checkpoint.tokens, checkpoint.pending, True
    run.guard, run.best = CollapseGuard(**checkpoint.guard), BestHeldOut(**checkpoint.best)
    run.average.load(scattered(checkpoint.average, run.average.weights))
    run.parallel.precision.scaler.load_state_dict(checkpoint.loss_scale)
