"""The training loop: it runs all steps of a plan, evaluates, logs metrics and writes checkpoints.

    indra train --data data/mixed_train --signals data/teacher_signals

Each step is a pure function of the settings and of its number (plan.py). So a stopped run resumes from its newest
checkpoint and ends exactly like a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.device import choose_device
from indraquantum.errors import TrainingStopped, UserError
from indraquantum.evaluation.held_out import evaluation_fits, held_out_cross_entropy
from indraquantum.interrupts import Interrupted, Interrupts
from indraquantum.kernels.measured import way_for
from indraquantum.kernels.ways import using
from indraquantum.metrics import MetricsLog, NoLog, metrics_up_to
from indraquantum.processes import joined_processes, own_device
from indraquantum.progress import Progress, tell, warn
from indraquantum.trackers import open_tracker, require_tracker
from indraquantum.training.checkpoint import (
    BEST_NAME,
    Checkpoint,
    prune_step_checkpoints,
    save_checkpoint,
)
from indraquantum.training.earlier import with_former_shape
from indraquantum.training.folders import (
    FolderRemoved,
    HeldFolders,
    metrics_path_of,
    set_others_metrics_aside,
    write_run_record,
)
from indraquantum.training.guards import PROBE_EVERY, probe, require_finite_state
from indraquantum.training.plan import plan_run
from indraquantum.training.resume import require_signals, resume
from indraquantum.training.run import Run, check_settings, start_run, will_resume
from indraquantum.training.samples import check_samples, samples_of
from indraquantum.training.signals import capture_signals, check_folders, find_signals, shards_of
from indraquantum.training.step import StepInput, StepResult


@dataclass(frozen=True)
class TrainReport:
    """The result of a run."""

    checkpoint: Path
    metrics: Path
    steps: int
    held_out: dict[str, float]  # cross-entropy per source at the end, nats per token


def train(settings: TrainSettings) -> TrainReport:
    """Train with `settings`, or resume the run if the output folder holds a checkpoint of it.

    After the first SIGTERM, SIGINT or SIGHUP, the run finishes the current step, writes a checkpoint and ends. A second
    SIGTERM or SIGINT ends it at once.

    Returns:
        The paths of the last checkpoint and of the metrics, and the held-out cross-entropy.

    Raises:
        UserError: settings, data or signals don't fit, the output folder holds another run or is in use, or a folder
            was removed during the run.
        TrainingStopped: the loss or a gradient is not finite.
        Interrupted: a signal came.
    """
    metrics_path = metrics_path_of(settings)
    with Interrupts() as interrupts, joined_processes() as processes, contextlib.ExitStack() as stack:
        with processes.together():
            require_tracker(settings.log_to)
            settings = with_former_shape(settings)
            device = own_device(choose_device(settings))
            plan = plan_run(settings, open_dataset("--data", settings.data, settings.tokenizer, verify=True))
        plan = find_signals(plan, processes)
        folders = None
        with processes.together():
            check_settings(settings, plan, device)
            check_samples(settings, plan.dataset.tokenizer, processes)
            check_folders(plan)
            if processes.is_first:
                folders = HeldFolders(settings.output, metrics_path.parent, stack)
        processes.first(lambda: require_signals(settings, plan))
        plan = capture_signals(plan, processes)
        stack.enter_context(using(processes.first(lambda: way_for(device))))
        resumes = processes.first(lambda: will_resume(settings, plan))
        with processes.together():
            run = start_run(settings, plan, device, processes, replaced=resumes)
        complete(run, metrics_path, interrupts, folders)
        return TrainReport(run.milestone_path, metrics_path, run.step, run.held_out or evaluate(run))


def complete(run: Run, metrics_path: Path, interrupts: Interrupts, folders: HeldFolders | None) -> None:
    """Resume `run` from its newest checkpoint, or begin it, and complete it. Write its metrics and run.json.

    Args:
        run: the run at its first step.
        metrics_path: the file for the metrics.
        interrupts: the signals that may ask the run to stop.
        folders: the folders that it writes to; None in a process that writes nothing.

    Raises:
        Interrupted: a signal came; there is a checkpoint of the last finished step.
    """
    settings, processes = run.settings, run.processes
    resumed = resume(run)
    is_complete = run.finished and run.pending is None
    if is_complete:
        tell(f"This run is finished: {run.step} steps, {run.tokens:,} tokens; see {settings.output}.")
    if not resumed:
        run.pending = {"step": 0, "tokens": 0, "epoch": 0.0}
    last_written = run.step - (run.pending is not None)
    with processes.together():
        log = NoLog()
        if processes.is_first:
            set_others_metrics_aside(metrics_path, run, resumed)
            kept = last_written if resumed else None
            if not is_complete:
                run.after_step = samples_of(run, metrics_path.parent, kept)
            history = metrics_up_to(metrics_path, kept)
            tracked = "none" if is_complete else settings.log_to
            tracker = open_tracker(tracked, metrics_path.parent, run.identity, kept, history)
            log = MetricsLog(metrics_path, kept, tracker)
    if not processes.alone:
        interrupts.join(processes.largest)
    with _closed(log):
        try:
            processes.first(lambda: write_run_record(metrics_path.parent, run))
            continue_run(run, log, interrupts, folders)
            processes.first(lambda: write_run_record(metrics_path.parent, run))
        except Interrupted as interrupted:
            if processes.is_first:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    said = f"Stopped at step {run.step} by {interrupted.name}. To resume, {_same_command(run)}."
                    warn(said)
            raise


@contextlib.contextmanager
def _closed(log: MetricsLog | NoLog) -> Iterator[None]:
    """Close `log` at the end. If an error ends the block, an error of the log, such as of its disk, doesn't hide it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            log.close(failed=True)
        raise
    log.close()


def _same_command(run: Run) -> str:
    """Say which command resumes `run`. With --resume PATH, the same one would go back to PATH."""
    return "run the same command" if run.settings.resume == "auto" else "run the same command with --resume auto"


def continue_run(run: Run, log: MetricsLog | NoLog, interrupts: Interrupts, folders: HeldFolders | None = None) -> None:
    """Do the remaining steps of `run`, until its end or a signal, and write a checkpoint there.

    Args:
        run: the run to continue.
        log: the metrics.
        interrupts: the signals that may ask the run to stop.
        folders: the folders that it writes to; None in a process that writes nothing.

    Raises:
        Interrupted: a signal came.
        FolderRemoved: one of the folders is gone.
        UserError: something can't be written. If it is in the logs, the run saves its last step if it can.
    """
    silent = not run.processes.is_first
    progress = Progress(run.name, run.total_steps, "steps", done=run.step, silent=silent)
    best, pending = run.best, run.pending
    with interrupts.deferred(), progress:
        try:
            while run.pending is not None or not run.finished:
                is_best, collapsed, best = False, None, replace(run.best)
                with run.processes.together():
                    if run.pending is None:
                        run.pending = take_step(run)
                        progress.update(1, figures_of(run.pending), short_figures_of(run.pending))
                        collapsed = watch_for_collapse(run)
                    if folders is not None:
                        folders.check(log)
                with run.processes.together():  # a block of its own, because an evaluation waits for all processes
                    if run.at_milestone or run.step % run.settings.evaluate_every == 0:
                        run.pending["held_out"] = evaluate(run, interrupts)
                        is_best = note_evaluation(run)
                    log.write(run.pending)
                    if collapsed:
                        raise TrainingStopped(f"{collapsed}; to continue, use --on-collapse warn")
                    if run.after_step is not None:
                        run.after_step(run)
                # A checkpoint may still have what was pending.
                pending, run.pending, run.saved = run.pending, None, False
                if is_best and run.step and run.keep_best:  # before the one to resume from, which is never ahead
                    write_checkpoint(run, run.folder / BEST_NAME, log)
                save_where_due(run, log)
                interrupts.check()
            save_where_due(run, log)
            with run.processes.together():
                if folders is not None:
                    folders.check(log)
        except Interrupted:
            if run.step and not run.saved:
                save(run, run.step_path, log)
            raise
        except FolderRemoved as removed:
            said = run.processes.first(lambda: folders.make_again(log))
            if run.step:
                save(run, run.milestone_path if run.finished else run.step_path, log)
                said = [*said, _saved(run)]
            raise FolderRemoved(removed.field, removed.value, "; ".join([removed.allowed, *said])) from None
        except UserError as error:
            if error.field != "--logs" or not run.step or run.saved:
                raise
            # A resumed run evaluates this step again and writes its metrics.
            run.best, run.pending, allowed = best, run.pending or pending, error.allowed
            with contextlib.suppress(Exception):  # whatever the logs' disk or a tracker raises
                log.sync()
            with contextlib.suppress(UserError):  # the disk of the checkpoints may be full too
                save(run, run.step_path, NoLog())
                allowed = f"{allowed}; {_saved(run)}"
            raise UserError(error.field, error.value, allowed) from None


def _saved(run: Run) -> str:
    return f"step {run.step} is saved in {run.folder}: to resume, {_same_command(run)}"


def take_step(run: Run) -> dict[str, Any]:
    """Do the next step of `run` and return its metrics.

    Raises:
        TrainingStopped: a weight, signal, loss or gradient is not finite.
        OutOfMemory: the step does not fit into the memory of the device.
    """
    step, stage = run.plan.step(run.step), run.plan.at(run.step)
    started = time.perf_counter()
    try:
        with run.step_fits():
            result = run.engine.step(step)
    except TrainingStopped as error:
        counted = "" if stage.train is stage.dataset.train else f" (rows of {', '.join(stage.spec.sources)} alone)"
        raise TrainingStopped(f"step {run.step + 1}: {error}{counted}") from None
    run.step += 1
    run.average.update(run.model, run.step)
    run.tokens += result.tokens
    run.saved = False
    return metrics_of(run, step, result, time.perf_counter() - started)


def watch_for_collapse(run: Run) -> str | None:
    """Look for collapse every PROBE_EVERY steps, and add the figures to the metrics of the step.

    Returns:
        The message to stop with, if a collapse is confirmed and the settings ask to stop then; otherwise None.

    Raises:
        TrainingStopped: the model's predictions are not finite.
    """
    if run.step % PROBE_EVERY or run.settings.on_collapse == "ignore":
        return None
    stage, held_out = run.stage, run.dataset.validation
    objective = run.engine.objective(run.plan.step(run.step - 1))
    with evaluation_fits(run.device), run.parallel.readable():
        try:
            look = probe(run.guard, run.model, objective, stage.dataset.train, held_out, stage.signals)
        except TrainingStopped as error:
            raise TrainingStopped(f"step {run.step}: {error}") from None
    look = run.processes.gather(look)[0]  # they may differ in the last digit, so the first process decides
    run.pending |= look.figures
    stops = run.settings.on_collapse == "stop"  # an earlier part of the run may have confirmed it
    found = look.standing if stops else look.confirmed
    if not found:
        return None
    said = f"step {run.step}: collapse ({', '.join(found)}); see these figures in the metrics"
    if not stops:
        tell(f"warning: {said}")
    return said if stops else None


def metrics_of(run: Run, step: StepInput, result: StepResult, seconds: float) -> dict[str, Any]:
    """Return the metrics of `step`, which `run` has just finished."""
    # Truncated signals say nothing about the other tokens, so they can't give an estimate of the true divergence.
    no_estimate = {"kd_estimate": None} if run.stage.has_truncated_signals else {}
    return {
        "step": run.step,
        "tokens": run.tokens,
        "stage": run.stage.spec.name,
        "epoch": run.plan.epochs_done(run.step),
        **result.terms,
        **no_estimate,
        "kd_weight": step.kd_weight,
        "phase_weight": step.phase_weight,
        "magnitude_weight": step.magnitude_weight,
        **result.readout,
        "learning_rate": step.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.tokens / seconds,
    }


def evaluate(run: Run, interrupts: Interrupts | None = None) -> dict[str, float]:
    """Measure, print and return the held-out cross-entropy. If the run keeps averaged weights, it uses these.

    Args:
        run: the run.
        interrupts: the signals that may interrupt the evaluation, but not the exchange of the weights.

    Raises:
        TrainingStopped: it is not finite.
        OutOfMemory: the evaluation does not fit into the memory of the device.
        Interrupted: a signal came.
    """
    interrupts = interrupts or Interrupts()  # this one is not open, so no signal reaches it
    # The weights, which may be sharded, are exchanged in place before they are gathered.
    exchanged = run.average.in_place_of(run.model)
    with evaluation_fits(run.device), exchanged, run.parallel.readable(), interrupts.at_once():
        figures = held_out_cross_entropy(run.model, run.dataset, run.device, run.processes, interrupts.check)
    run.held_out = figures
    if not all(map(math.isfinite, figures.values())):
        raise TrainingStopped(f"step {run.step}: the held-out cross-entropy is not finite: {figures}")
    text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    ended = run.plan.ends_at(run.step)
    stage = f", end of stage {ended.spec.name}" if ended and len(run.plan.stages) > 1 else ""
    tell(f"step {run.step}/{run.total_steps}{stage}: held-out cross-entropy (nats/token) {text}")
    return figures


def note_evaluation(run: Run) -> bool:
    """Record the last evaluation, which may end the run, and return whether it is the best so far."""
    best = run.best
    is_best = best.take(run.step, run.held_out["all"], run.patience)
    if best.stopped:
        waited = f"{best.evaluations_since} evaluations without a better held-out cross-entropy"
        tell(f"step {run.step}: stopped early, {waited} than {best.cross_entropy:.4f} at step {best.step}")
    return is_best


def save_where_due(run: Run, log: MetricsLog | NoLog) -> None:
    """Write a checkpoint if the run is at a milestone, such as the end of an epoch, or if a step checkpoint is due."""
    if run.step and run.at_milestone:
        if run.processes.largest(not (run.saved and run.milestone_path.exists())):
            save(run, run.milestone_path, log)
    elif (run.step % run.settings.save_every == 0 or _decay_begins(run, run.step)) and run.step and not run.saved:
        save(run, run.step_path, log)


def _decay_begins(run: Run, step: int) -> bool:
    """Return whether wsd begins to decay after `step`. After this step, the run can't have another length."""
    return run.plan.at(step).rate_decays_from(step)


def save(run: Run, path: Path, log: MetricsLog | NoLog) -> None:
    """Write a checkpoint to resume from, and remove old step checkpoints.

    Raises:
        TrainingStopped: a weight or the optimiser's state is not finite; nothing is written.
    """
    write_checkpoint(run, path, log)
    run.saved = True
    if run.processes.is_first:
        prune_step_checkpoints(run.folder, run.settings.keep_last, lambda step: _decay_begins(run, step))


def write_checkpoint(run: Run, path: Path, log: MetricsLog | NoLog) -> None:
    """Write a checkpoint of the present state of `run`, after its metrics are on disk.

    The first process writes it. The file does not depend on the number of processes.

    Raises:
        TrainingStopped: a weight or the optimiser's state is not finite; nothing is written.
    """
    checkpoint = checkpoint_of(run)

    def write() -> None:
        require_finite_state(checkpoint.model, checkpoint.optimizer, run.step)
        log.sync()
        save_checkpoint(path, checkpoint)
        tell(f"wrote {path}")

    run.processes.first(write)


def checkpoint_of(run: Run) -> Checkpoint:
    """Return all that `run` needs to resume, in the first process. All processes must call this together."""
    tokenizer, state = run.dataset.tokenizer, run.parallel.whole_state(run.optimizer, run.average)
    return Checkpoint(
        model_config=run.model.config.to_dict(),
        model=state.model,
        average=state.average,
        optimizer=state.optimizer,
        step=run.step,
        tokens=run.tokens,
        finished=run.finished,
        pending=run.pending,
        guard=vars(run.guard),
        best=vars(run.best),
        loss_scale=run.parallel.precision.scaler.state_dict(),
        settings=run.identity,
        tokenizer={"json": tokenizer.to_json(), "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
        signal_shards=shards_of(run.plan),
    )


def figures_of(metrics: dict[str, Any]) -> str:
    """Return loss terms, learning rate and speed of a step as text for a line of a log."""
    rate, speed = f"learning rate {metrics['learning_rate']:.2e}", f"{metrics['tokens_per_second']:,.0f} tokens/s"
    return ", ".join([*_terms_of(metrics), rate, speed])


def short_figures_of(metrics: dict[str, Any]) -> str:
    """Return the same for a bar, whose end a narrow terminal cuts off."""
    rate, speed = f"lr {metrics['learning_rate']:.1e}", f"{metrics['tokens_per_second']:,.0f} tokens/s"
    return ", ".join([speed, rate, *_terms_of(metrics)])


def _terms_of(metrics: dict[str, Any]) -> list[str]:
    names = [name for name in ("ce", "kd", "phase", "magnitude") if metrics.get(name) is not None]
    return [f"{name} {metrics[name]:.3f}" for name in names]
