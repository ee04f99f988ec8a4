"""The unified run (v4): cross-entropy, distillation and phase/magnitude alignment from the first step to the last.

    indra train --data data/mixed_train --signals data/teacher_signals

A batch, a learning rate and a loss weight are pure functions of (seed, step), so that a run that was stopped goes on
from its newest checkpoint exactly as if it had not been.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.data.dataset import PreparedDataset, open_dataset
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.evaluation.held_out import held_out_cross_entropy
from indraquantum.files import combined_sha256, make_folder
from indraquantum.loss_v2 import SemanticDistillationLoss
from indraquantum.metrics import MetricsLog
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.teacher.capture import capture
from indraquantum.teacher.signals import SignalStore, open_signals
from indraquantum.training.checkpoint import Checkpoint, checkpoint_path, newest_checkpoint, save_checkpoint
from indraquantum.training.schedule import linear_weight, rows_of_step, steps_per_epoch
from indraquantum.training.step import StepResult, optimizer_step, set_learning_rates

MICRO_BATCH_TOKENS = 8192  # positions in one forward pass; a larger step accumulates gradients
BETAS = (0.9, 0.95)
# What may change between two starts of one run without changing what it computes.
FREE_SETTINGS = {"output", "logs", "device", "threads", "data", "signals", "teacher", "tokenizer"}


@dataclass(frozen=True)
class TrainReport:
    """What a run ended with."""

    checkpoint: Path
    metrics: Path
    steps: int
    held_out: dict[str, float]  # cross-entropy per source at the end, nats per token


@dataclass
class Run:
    """Everything that one run carries from step to step."""

    settings: TrainSettings
    dataset: PreparedDataset
    signals: SignalStore | None
    model: IndraQuantumPhase2
    optimizer: torch.optim.Optimizer
    device: torch.device
    objective: SemanticDistillationLoss
    identity: dict[str, Any]
    total_steps: int
    steps_per_epoch: int
    step: int = 0
    tokens: int = 0
    held_out: dict[str, float] | None = None  # of the last evaluation

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.total_steps


def train(settings: TrainSettings) -> TrainReport:
    """Train by `settings`, going on from the newest checkpoint in the output folder where there is one.

    Returns:
        Where the last checkpoint and the metrics are, and the held-out cross-entropy.

    Raises:
        UserError: settings, data or signals that don't fit, or an output folder that holds another run.
        TrainingStopped: the loss or a gradient is not finite.
    """
    if settings.head != "interference":
        raise UserError("--head", settings.head, "must be interference: the objective does not serve the other")
    device = choose_device(settings)
    dataset = open_dataset("--data", settings.data, settings.tokenizer, verify=True)
    metrics_path = settings.logs / settings.output.resolve().name / "metrics.jsonl"
    make_folder("--output", settings.output)
    make_folder("--logs", metrics_path.parent)
    signals = None if settings.no_teacher else find_signals(settings, dataset)
    run = start_run(settings, dataset, signals, device)
    checkpoint = newest_checkpoint(settings.output)
    if checkpoint is not None:
        resume(run, checkpoint)
    if run.finished:
        print(f"This run is finished: {run.step} steps, {run.tokens:,} tokens; see {settings.output}.")
    log = MetricsLog(metrics_path, run.step if checkpoint else None)
    try:
        path = continue_run(run, log)
    finally:
        log.close()
    return TrainReport(path, metrics_path, run.step, run.held_out or evaluate(run))


def find_signals(settings: TrainSettings, dataset: PreparedDataset) -> SignalStore:
    """The teacher's signals for `dataset`: those there are, or captured now from the teacher."""
    folder = settings.signals or settings.data.parent / "teacher_signals"
    if settings.signals is None and not (folder / "manifest.json").exists():
        print(f"No teacher signals at {folder}: capturing from {settings.teacher}.")
        try:
            capture(
                CaptureSettings(
                    data=settings.data,
                    teacher=settings.teacher,
                    output=folder,
                    device=settings.device,
                    threads=settings.threads,
                ),
                dataset,
            )
        except UserError as error:
            raise UserError(error.field, error.value, f"{error.allowed}; or --no-teacher") from None
    store = open_signals("--signals", folder, dataset)
    print(f"Teacher signals: {folder}, {100 * store.coverage:.1f} % of the training rows covered.")
    return store


def start_run(
    settings: TrainSettings, dataset: PreparedDataset, signals: SignalStore | None, device: torch.device
) -> Run:
    """A run at its first step: seeded weights, fresh optimiser.

    Raises:
        UserError: the model's settings contradict each other.
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
    per_epoch = steps_per_epoch(dataset.train.num_rows, rows_per_step(settings.batch_tokens, dataset.row_length))
    total_steps = settings.epochs * per_epoch
    distil = signals is not None
    return Run(
        settings=settings,
        dataset=dataset,
        signals=signals,
        model=model,
        optimizer=torch.optim.AdamW(
            model.parameter_groups(settings.learning_rate, settings.table_rate, settings.weight_decay),
            betas=BETAS,
            fused=True,
        ),
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
    """Rows of one optimiser step; at least one."""
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


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Put `run` where `checkpoint` stands.

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
    run.model.load_state_dict(checkpoint.model)
    run.optimizer.load_state_dict(checkpoint.optimizer)
    run.step, run.tokens = checkpoint.step, checkpoint.tokens
    if not run.finished:
        print(f"Going on from step {run.step} of {run.total_steps}.")


def continue_run(run: Run, log: MetricsLog) -> Path:
    """Take `run` from where it stands to its end; the path of its last checkpoint."""
    if run.step == 0:
        log.write({"step": 0, "tokens": 0, "epoch": 0.0, "held_out": evaluate(run)})
    # disable=None: no bar where there is no terminal
    with tqdm(total=run.total_steps, initial=run.step, unit="step", disable=None) as bar:
        while not run.finished:
            metrics = take_step(run)
            at_end_of_epoch = run.step % run.steps_per_epoch == 0 or run.finished
            if at_end_of_epoch or run.step % run.settings.evaluate_every == 0:
                metrics["held_out"] = evaluate(run)
            log.write(metrics)
            if at_end_of_epoch:
                save(run)
            bar.update()
            bar.set_postfix_str(postfix(metrics))
    return checkpoint_path(run.settings.output, math.ceil(run.step / run.steps_per_epoch))


def take_step(run: Run) -> dict[str, Any]:
    """One optimiser step at `run.step`, with the schedules' values of that step; its metrics."""
    settings, step = run.settings, run.step
    learning_rate = set_learning_rates(run.optimizer, settings, step, run.total_steps)
    if run.signals is not None:
        run.objective.kd_weight = linear_weight(
            settings.kd_weight_start, settings.kd_weight_end, step, run.total_steps
        )
    # Dropout is the only randomness of a step: seeding it by the step makes resume exact without saving any state.
    torch.manual_seed(settings.seed * 1_000_003 + step)
    started = time.perf_counter()
    row_length = run.dataset.row_length
    rows = rows_of_step(
        run.dataset.train.num_rows, rows_per_step(settings.batch_tokens, row_length), settings.seed, step
    )
    result = optimizer_step(
        run.model,
        run.objective,
        run.optimizer,
        run.dataset.train,
        rows,
        run.signals,
        micro_batch_rows=max(1, MICRO_BATCH_TOKENS // row_length),
        max_grad_norm=settings.max_grad_norm,
    )
    run.step += 1
    run.tokens += result.tokens
    return metrics_of(run, result, learning_rate, time.perf_counter() - started)


def metrics_of(run: Run, result: StepResult, learning_rate: float, seconds: float) -> dict[str, Any]:
    """The metrics line of the step that was just done."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "epoch": run.step / run.steps_per_epoch,
        **result.terms,
        "kd_weight": run.objective.kd_weight,
        "phase_weight": run.objective.phase_weight,
        "magnitude_weight": run.objective.magnitude_weight,
        **result.readout,
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.tokens / seconds,
    }


def evaluate(run: Run) -> dict[str, float]:
    """Held-out cross-entropy now, kept, printed and returned."""
    figures = run.held_out = held_out_cross_entropy(run.model, run.dataset, run.device)
    text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    tqdm.write(f"step {run.step}/{run.total_steps}: held-out cross-entropy (nats/token) {text}")
    return figures


def save(run: Run) -> None:
    """Write the checkpoint of the epoch that `run` is in."""
    tokenizer = run.dataset.tokenizer
    path = checkpoint_path(run.settings.output, math.ceil(run.step / run.steps_per_epoch))
    save_checkpoint(
        path,
        Checkpoint(
            model_config=run.model.config.to_dict(),
            model=run.model.state_dict(),
            optimizer=run.optimizer.state_dict(),
            step=run.step,
            tokens=run.tokens,
            finished=run.finished,
            settings=run.identity,
            tokenizer={"json": tokenizer.to_json(), "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
        ),
    )
    tqdm.write(f"wrote {path}")


def postfix(metrics: dict[str, Any]) -> str:
    """The four terms for the progress bar."""
    names = [name for name in ("ce", "kd", "phase", "magnitude") if metrics.get(name) is not None]
    return " ".join(f"{name} {metrics[name]:.3f}" for name in names)
