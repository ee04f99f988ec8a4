"""One run of an ablation, from its first step to its JSON file, in its own process. A stopped run is resumed."""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from indraquantum.ablation.results import Result, check_checkpoint, write_result
from indraquantum.ablation.sizes import sizes_of
from indraquantum.ablation.tasks import Task
from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepared import PreparedDataset
from indraquantum.device import choose_device
from indraquantum.errors import TrainingStopped
from indraquantum.evaluation.binned import calibration_bins, readout_bins
from indraquantum.evaluation.collapse import CollapseFigures
from indraquantum.evaluation.figures import alignment_with, figures_by_source, frequency_bands, predict
from indraquantum.evaluation.halves import Half, bytes_by_source, documents_of_half, of_documents
from indraquantum.inference.load import load_model
from indraquantum.inference.samples import write_samples
from indraquantum.memory import peak_bytes
from indraquantum.metrics import checked_lines, last_metrics
from indraquantum.teacher.signals import open_signals
from indraquantum.training.checkpoint import load_checkpoint, newest_checkpoint
from indraquantum.training.earlier import with_defaults
from indraquantum.training.folders import metrics_path_of
from indraquantum.training.loop import train
from indraquantum.training.plan import plan_run
from indraquantum.training.run import COMPUTED_BY

FIGURES = ("held_out", *CollapseFigures._fields, "collapse")
CURVE = ("step", "tokens", "stage", *FIGURES)  # kept of the metrics
CURVE_POINTS = 60  # about this many collapse figures are kept


def run_task(task: Task) -> None:
    """Train a run, measure it, write its JSON file, and remove its checkpoints.

    Raises:
        UserError: settings, data or signals don't fit, the work folder holds another run, or the disk is full; nothing
            is written.
        Interrupted: a signal came; the same task resumes.
    """
    settings, started = task.settings, time.monotonic()
    metrics_path = metrics_path_of(settings)
    steps_before = max((line.step for line in checked_lines(metrics_path)), default=0)
    dataset = open_dataset("--data", settings.data)
    record: Result = {**task.planned, **task.origin, "seed": settings.seed, **asdict(sizes_of(settings, dataset))}
    record["checkpoint_kept"] = task.keep_checkpoint
    _check_begun(task, dataset)
    try:
        report = train(settings)
    except TrainingStopped as stopped:
        record |= {"status": "failed", "line": str(stopped), "curve": curve(metrics_path)}
        write_result(task.result, record)
    else:
        # None if an earlier process did the work.
        peak = peak_memory(choose_device(settings)) if report.steps > steps_before else None
        timing = {
            "tokens_per_second": tokens_per_second(metrics_path),
            "peak_memory_bytes": peak,
            "seconds_of_last_process": time.monotonic() - started,
        }
        figures = measure(report.checkpoint, settings, task.planned["half"], task.measured_with)
        done = {"steps": report.steps, "tokens": last_metrics(metrics_path)["tokens"]}  # in place of those planned
        record |= {"status": "finished", **done, **figures, "computed_by": computed_by(report.checkpoint)}
        record |= {"curve": curve(metrics_path), "timing": timing}
        write_result(task.result, record)
    drop_checkpoints(task)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has held: of tensors on a CUDA device, else of main memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def _check_begun(task: Task, dataset: PreparedDataset) -> None:
    """Check that the run that training would resume, if there is one, is that of `task`."""
    found = newest_checkpoint(task.settings.output, plan_run(task.settings, dataset).step_of_epoch)
    if found is not None:
        check_checkpoint(task.settings.output, found.checkpoint.settings, task.planned)


def computed_by(checkpoint: Path) -> dict[str, Any]:
    """Return the number formats, the order of the rows and the products of a trained model. The device chose some."""
    settings = with_defaults(load_checkpoint("--work", checkpoint).settings, COMPUTED_BY)
    return {name: settings.get(name) for name in COMPUTED_BY}


def measure(checkpoint: Path, settings: TrainSettings, half: Half, signals_path: Path | None) -> dict[str, Any]:
    """Return the figures of a checkpoint on one half of the held-out documents, as plain values."""
    device = choose_device(settings)
    dataset = open_dataset("--data", settings.data)
    documents_U = documents_of_half(dataset, half)
    model, tokenizer = load_model(checkpoint, device)
    found = of_documents(predict(model, dataset.validation, device), dataset.validation, documents_U)
    counts_V = dataset.train.label_counts(tokenizer.vocabulary_size)
    sources = figures_by_source(found, bytes_by_source(dataset, dataset.validation, documents_U))
    result = {
        "documents": int(documents_U.sum()),
        "vocabulary_size": tokenizer.vocabulary_size,
        "sources": {name: asdict(figures) for name, figures in sources.items()},
        "bands": {name: asdict(band) for name, band in frequency_bands(found, counts_V).items()},
        "alignment": None,
        "calibration": calibration_bins(found),
        "readouts": None,
        "samples": asdict(write_samples(model, tokenizer)) if half == "table" else None,
    }
    if signals_path is not None:
        signals = open_signals("--signals", signals_path, dataset)
        result["alignment"] = asdict(alignment_with(found, signals))
        result["readouts"] = readout_bins(found, signals, tokenizer.vocabulary_size)
    return result


def curve(metrics_path: Path) -> list[dict[str, Any]]:
    """Return the metrics that the report plots: all held-out figures, and collapse figures, thinned in a long run."""
    found = (line.parse() for line in checked_lines(metrics_path) if not all(map(line.lacks, FIGURES)))
    lines = [{name: line[name] for name in CURVE} for line in found]
    every = -(-len(lines) // CURVE_POINTS)
    return [line for i, line in enumerate(lines) if i % every == 0 or line["held_out"] or line["collapse"]]


def tokens_per_second(metrics_path: Path) -> float | None:
    """Return the median over the steps, without the time of evaluations and checkpoints."""
    rates = [line.parse()["tokens_per_second"] for line in checked_lines(metrics_path)]
    return statistics.median([rate for rate in rates if rate is not None] or [float("nan")])


def drop_checkpoints(task: Task) -> None:
    """Remove the checkpoints of a finished run. Its metrics and log stay."""
    if not task.keep_checkpoint:
        shutil.rmtree(task.settings.output, ignore_errors=True)
