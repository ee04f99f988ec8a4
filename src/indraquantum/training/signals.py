"""The teacher's signals for the stages of a run: this module finds those that exist and captures the others.

A stage whose weights are all 0 needs no signals.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.processes import ALONE, Processes
from indraquantum.progress import tell
from indraquantum.teacher.capture import capture
from indraquantum.teacher.signals import SignalStore, verify_signals
from indraquantum.training.plan import Plan, RunStage


def find_signals(plan: Plan, processes: Processes = ALONE, opened: SignalStore | None = None) -> Plan:
    """Return `plan` with the signals that exist already. Stages whose signals are not captured yet get none.

    Args:
        plan: the stages.
        processes: the processes of the run; all of them call this.
        opened: the signals of the plan's own dataset, if they are open already.

    Raises:
        UserError: signals are not in the folder of --signals, are damaged, belong to another dataset, or lack what a
            stage needs.
    """
    found: dict[tuple[str, Path], SignalStore | None] = {}
    stages = []
    for stage in plan.stages:
        if stage.lacks_signals:
            place = _place(stage)
            if place not in found:
                _whose_temperature_counts(plan, stage)
                is_open = opened is not None and stage.dataset is plan.dataset
                found[place] = opened if is_open else _verified_signals(stage, processes)
            stage = replace(stage, signals=found[place])
            if stage.signals is not None:
                with processes.together():
                    _check_signals(stage, stage.signals)
        stages.append(stage)
    return replace(plan, stages=tuple(stages))


def capture_signals(plan: Plan, processes: Processes = ALONE) -> Plan:
    """Return `plan` with signals for every stage that needs them. The first process captures missing signals.

    Raises:
        UserError: there is no teacher, or the signals lack what a stage needs.
    """
    while (stage := next((stage for stage in plan.stages if stage.lacks_signals), None)) is not None:
        asked = _whose_temperature_counts(plan, stage)
        processes.first(lambda asked=asked: _capture(asked))
        plan = find_signals(plan, processes)
    return plan


def _whose_temperature_counts(plan: Plan, first: RunStage) -> RunStage:
    """Return a stage that shares the signals of `first` and sets their temperature, or `first` if none sets it.

    Raises:
        UserError: two stages set different temperatures.
    """
    sharing = (stage for stage in plan.stages if _place(stage) == _place(first) and stage.spec.asks_the_teacher)
    stated = [stage for stage in sharing if stage.spec.temperature is not None]
    for stage in stated:
        if stage.spec.temperature != stated[0].spec.temperature:
            allowed = f"must be {stated[0].spec.temperature}, as in stage {stated[0].spec.name}, on the same data"
            raise UserError(f"--strategy: stage {stage.spec.name}: temperature", stage.spec.temperature, allowed)
    return stated[0] if stated else first


def _place(stage: RunStage) -> tuple[str, Path]:
    """Return what is equal for stages that share signals: the data, and the folder of the signals."""
    return stage.dataset.content_sha256, folder_of(stage.settings).resolve()


def check_folders(plan: Plan) -> None:
    """Check that each dataset has its own folder of signals. This comes before a capture, which may take hours.

    Raises:
        UserError: the signals of two datasets would go into one folder.
    """
    first: dict[Path, RunStage] = {}
    for stage in plan.stages:
        if stage.spec.asks_the_teacher:
            folder = folder_of(stage.settings).resolve()
            other = first.setdefault(folder, stage)
            if other.dataset.content_sha256 != stage.dataset.content_sha256:
                allowed = f"must be another folder than that of stage {other.spec.name}, which has other data"
                raise UserError(f"--strategy: stage {stage.spec.name}: signals", folder_of(stage.settings), allowed)


def _verified_signals(stage: RunStage, processes: Processes) -> SignalStore | None:
    """Return the signals for the dataset of `stage`, or None if they are not captured yet."""
    settings, folder = stage.settings, folder_of(stage.settings)
    if processes.first(lambda: settings.signals is None and not (folder / "manifest.json").exists()):
        return None
    with processes.together():
        store = verify_signals("--signals", folder, stage.dataset)
        if store.coverage == 0:  # a capture that was stopped before its first shard
            allowed = "must cover a training row: resume the capture with `indra capture`, or train with --no-teacher"
            raise UserError("--signals", folder, allowed)
        tell(f"Teacher signals: {folder}, {100 * store.coverage:.1f} % of the training rows covered.")
        return store


def folder_of(settings: TrainSettings) -> Path:
    """Return the folder of the signals, which may not exist yet."""
    return settings.signals or settings.data.parent / "teacher_signals"


def _capture(stage: RunStage) -> None:
    settings, folder = stage.settings, folder_of(stage.settings)
    tell(f"No teacher signals at {folder}: capturing from {settings.teacher}.")
    stated = {} if stage.spec.temperature is None else {"temperature": stage.spec.temperature}
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
    weights, manifest, where = stage.spec.weights, signals.manifest, f"--strategy: stage {stage.spec.name}: "
    if stage.spec.temperature not in (None, manifest.temperature):
        allowed = (
            f"must be {manifest.temperature}, as in the signals; for another temperature, run `indra "
            "capture --temperature`"
        )
        raise UserError(f"{where}temperature", stage.spec.temperature, allowed)
    if manifest.served and weights.phase.highest > 0:
        allowed = "must be 0 with the signals of a served teacher, whose entropy is not exact"
        raise UserError("--phase-weight", weights.phase.highest, allowed)
    begins = stage.dataset.train.row_token_offsets
    covered = [begins[list(entry.rows)] for entry in manifest.shards if entry.split == "train"]
    places = stage.train.piece_places
    if not any(((places >= start) & (places < end)).any() for start, end in covered):
        allowed = "must cover a row of the stage: resume the capture with `indra capture`, or train with --no-teacher"
        raise UserError(f"{where}signals", stage.settings.signals or "those beside the data", allowed)
