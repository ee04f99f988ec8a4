"""The teacher's signals of a run's stages: those that are there, or captured on the way.

A stage whose weights are all 0 needs none, and none are looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.processes import ALONE, Processes
from indraquantum.teacher.capture import capture
from indraquantum.teacher.signals import SignalStore, verify_signals
from indraquantum.training.stages import RunStage, StagePlan


def with_signals(
    plan: StagePlan, find: Callable[[RunStage], SignalStore | None], processes: Processes = ALONE
) -> StagePlan:
    """`plan` with the teacher's signals at every stage that needs them and has none yet.

    Args:
        plan: the stages.
        find: the signals for the dataset of a stage, asked once for each dataset and folder; None where there are none.
        processes: those of the run, which all call this.

    Raises:
        UserError: the signals can't give what a stage needs.
    """
    found: dict[tuple[str, Path], SignalStore | None] = {}
    stages = []
    for stage in plan.stages:
        if stage.about.asks_the_teacher and stage.signals is None:
            key = _place(stage)
            if key not in found:
                found[key] = find(_whose_temperature_counts(plan, stage))
            stage = replace(stage, signals=found[key])
            if stage.signals is not None:
                with processes.together():
                    _check_signals(stage, stage.signals)
        stages.append(stage)
    return replace(plan, stages=tuple(stages))


def _whose_temperature_counts(plan: StagePlan, first: RunStage) -> RunStage:
    """Of the stages that share the signals of `first`, one that states their temperature, or `first`.

    Raises:
        UserError: two state different ones.
    """
    sharing = (stage for stage in plan.stages if _place(stage) == _place(first) and stage.about.asks_the_teacher)
    stated = [stage for stage in sharing if stage.about.temperature is not None]
    for stage in stated:
        if stage.about.temperature != stated[0].about.temperature:
            allowed = f"must be {stated[0].about.temperature}, as in stage {stated[0].about.name}, on the same data"
            raise UserError(f"--strategy: stage {stage.about.name}: temperature", stage.about.temperature, allowed)
    return stated[0] if stated else first


def _place(stage: RunStage) -> tuple[str, Path]:
    """What stages have in common that share signals: the data, and the folder of the signals."""
    return stage.dataset.content_sha256, folder_of(stage.settings).resolve()


def check_folders(plan: StagePlan) -> None:
    """Check, before a teacher is asked for hours, that each dataset has a folder of signals of its own.

    Raises:
        UserError: two would be captured into one.
    """
    first: dict[Path, RunStage] = {}
    for stage in plan.stages:
        if stage.about.asks_the_teacher:
            folder = folder_of(stage.settings).resolve()
            other = first.setdefault(folder, stage)
            if other.dataset.content_sha256 != stage.dataset.content_sha256:
                allowed = f"must be another folder than stage {other.about.name}'s, whose data are others"
                raise UserError(f"--strategy: stage {stage.about.name}: signals", folder_of(stage.settings), allowed)


def found_signals(stage: RunStage, processes: Processes = ALONE) -> SignalStore | None:
    """The signals for the dataset of `stage`, verified; None where they are still to be captured.

    Raises:
        UserError: they are not where --signals says, are damaged, or don't belong to the dataset.
    """
    settings, folder = stage.settings, folder_of(stage.settings)
    if processes.first(lambda: settings.signals is None and not (folder / "manifest.json").exists()):
        return None
    with processes.together():
        store = verify_signals("--signals", folder, stage.dataset)
        if store.coverage == 0:  # a capture that was stopped before its first shard
            allowed = "must cover a training row: go on with `indra capture`, or train with --no-teacher"
            raise UserError("--signals", folder, allowed)
        print(f"Teacher signals: {folder}, {100 * store.coverage:.1f} % of the training rows covered.")
        return store


def captured_signals(stage: RunStage, processes: Processes = ALONE) -> SignalStore | None:
    """The signals for the dataset of `stage`, captured now by the first process.

    Raises:
        UserError: there is no teacher.
    """
    processes.first(lambda: _capture(stage))
    return found_signals(stage, processes)


def folder_of(settings: TrainSettings) -> Path:
    """Where the signals are, or will be."""
    return settings.signals or settings.data.parent / "teacher_signals"


def _capture(stage: RunStage) -> None:
    settings, folder = stage.settings, folder_of(stage.settings)
    print(f"No teacher signals at {folder}: capturing from {settings.teacher}.")
    stated = {} if stage.about.temperature is None else {"temperature": stage.about.temperature}
    try:
        capture(
            CaptureSettings(
                data=settings.data,
                teacher=settings.teacher,
                output=folder,
                device=settings.device,
                threads=settings.threads,
                **stated,
            ),
            stage.dataset,
        )
    except UserError as error:
        raise UserError(error.field, error.value, f"{error.allowed}; or --no-teacher") from None


def _check_signals(stage: RunStage, signals: SignalStore) -> None:
    weights, manifest, where = stage.about.weights, signals.manifest, f"--strategy: stage {stage.about.name}: "
    if stage.about.temperature not in (None, manifest.temperature):
        allowed = f"must be the signals' {manifest.temperature}; for another, `indra capture --temperature`"
        raise UserError(f"{where}temperature", stage.about.temperature, allowed)
    if manifest.served and weights.phase.highest > 0:
        allowed = "must be 0 with the signals of a served teacher, whose entropy is not exact"
        raise UserError("--phase-weight", weights.phase.highest, allowed)
    begins = stage.dataset.train.row_token_offsets
    covered = [begins[list(entry.rows)] for entry in manifest.shards if entry.split == "train"]
    places = stage.train.piece_places
    if not any(((places >= start) & (places < end)).any() for start, end in covered):
        allowed = "must cover a row of the stage: go on with `indra capture`, or train with --no-teacher"
        raise UserError(f"{where}signals", stage.settings.signals or "those beside the data", allowed)
