"""A run that leaves nothing behind: for looking at what a run would be, before it is started.

It is built as `indra train` builds it, but no folder is made, no teacher is asked and no checkpoint is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.device import choose_device
from indraquantum.kernels.measured import way_for
from indraquantum.kernels.ways import put_in_force
from indraquantum.teacher.signals import SignalStore
from indraquantum.training.loop import take_step
from indraquantum.training.run import Run, start_run
from indraquantum.training.stages import RunStage, plan_stages
from indraquantum.training.taught import folder_of, found_signals, with_signals


def scratch_run(settings: TrainSettings) -> Run:
    """A run at its first step; without signals where none are captured yet.

    Raises:
        UserError: settings, data or signals that don't fit.
    """
    device = choose_device(settings)
    put_in_force(way_for(device))
    dataset = open_dataset("--data", settings.data, settings.tokenizer, verify=True)
    plan = with_signals(plan_stages(settings, dataset), _signals_there)
    return start_run(settings, plan, device)


def _signals_there(stage: RunStage) -> SignalStore | None:
    store = found_signals(stage)
    if store is None:
        print(
            f"No teacher signals at {folder_of(stage.settings)}: going on without; `indra train` captures them first."
        )
    return store


@dataclass(frozen=True)
class TimedStep:
    """One optimiser step that was really taken."""

    metrics: dict[str, float | None]
    seconds: float


def timed_step(run: Run) -> TimedStep:
    """Take the next step of `run` and time it."""
    started = time.perf_counter()
    metrics = take_step(run)
    return TimedStep(metrics, time.perf_counter() - started)
