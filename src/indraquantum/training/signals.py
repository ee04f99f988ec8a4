"""The teacher's signals for the stages of a run: this module finds those that exist and captures the others.

A stage whose weights are all 0 needs no signals.

Training completes a capture that it began itself, which the file MARK of teacher/capture.py tells. One that
`indra capture` began is used as it is, also if it is unfinished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.files import combined_sha256
from indraquantum.processes import ALONE, Processes
from indraquantum.progress import tell
from indraquantum.teacher.capture import MARK, FolderInUse, capture
from indraquantum.teacher.manifest import MANIFEST_NAME, read_manifest, signals_beside, statistics_of
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
    """Return the signals for the dataset of `stage`, or None if training is still to capture them."""
    settings, folder = stage.settings, folder_of(stage.settings)
    field = option_of(stage)
    if processes.first(lambda: settings.signals is None and _is_to_capture(field, folder)):
        return None
    with processes.together():
        store = verify_signals(field, folder, stage.dataset)
        if store.coverage == 0:  # a capture that was stopped before its first shard
            allowed = "must cover a training row: resume the capture with `indra capture`, or train with --no-teacher"
            raise UserError(field, folder, allowed)
        tell(f"Teacher signals: {folder}, {100 * store.coverage:.1f} % of the training rows covered.")
        return store


def folder_of(settings: TrainSettings) -> Path:
    """Return the folder of the signals, which may not exist yet."""
    return settings.signals or signals_beside(settings.data)


def option_of(stage: RunStage) -> str:
    """Return what names the folder of the stage's signals: an option, or an entry of the file of the strategy."""
    return "--signals" if stage.spec.data is None else f"--strategy: stage {stage.spec.name}: signals"


def how_to_name(stage: RunStage) -> str:
    """Say in a message how to name another folder for the signals of `stage`."""
    if stage.spec.data is None:
        return "with --signals"
    return f"as `signals` of stage {stage.spec.name} in the file of --strategy"


def _is_to_capture(field: str, folder: Path) -> bool:
    """Return whether there are no signals in `folder`, or only those of an unfinished capture that training began."""
    if not (folder / MANIFEST_NAME).exists():
        return True
    return (folder / MARK).exists() and not read_manifest(field, folder).complete


def _capture(stage: RunStage) -> None:
    settings, folder = stage.settings, folder_of(stage.settings)
    begun = (folder / MANIFEST_NAME).exists()
    found = "Unfinished" if begun else "No"
    tell(f"{found} teacher signals at {folder}: capturing from {settings.teacher}.")
    stated = {} if stage.spec.temperature is None else {"temperature": stage.spec.temperature}
    options = CaptureSettings(
        data=settings.data,
        teacher=settings.teacher,
        output=folder,
        device=settings.device,
        threads=settings.threads,
        **stated,
    )
    try:
        capture(options, stage.dataset, by_train=True)
    except FolderInUse as error:
        raise UserError(option_of(stage), folder, error.allowed) from None
    except UserError as error:
        field = option_of(stage) if error.field == "--output" else error.field  # of the capture, not of the run
        way_out = "or --no-teacher"
        if begun:
            way_out = f"to train on what is there, give {folder} {how_to_name(stage)}; to capture anew, remove it"
        raise UserError(field, error.value, f"{error.allowed}; {way_out}") from None


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


def sha256_of_signals(signals: SignalStore) -> str:
    """Return one SHA-256 for all shards of `signals`."""
    return combined_sha256(entry.sha256 for entry in signals.manifest.shards)


def shards_of(plan: Plan) -> dict[str, list[str]]:
    """Return the SHA-256 of each shard of the plan's signals, by the SHA-256 of all of them."""
    stores = [stage.signals for stage in plan.stages if stage.signals is not None]
    return {sha256_of_signals(store): [entry.sha256 for entry in store.manifest.shards] for store in stores}


def with_shards(stage: RunStage, signals: SignalStore, wanted: Sequence[str]) -> RunStage:
    """Return `stage` with those shards of `signals` whose SHA-256 is in `wanted`; unchanged if one is not there."""
    there, names = signals.manifest, set(wanted)
    shards = tuple(entry for entry in there.shards if entry.sha256 in names)
    if shards == there.shards or [entry.sha256 for entry in shards] != list(wanted):
        return stage
    part = there.model_copy(update={"shards": shards, "complete": False, "statistics": statistics_of(shards)})
    kept = SignalStore(option_of(stage), folder_of(stage.settings), part, stage.dataset)
    said = f"This run began with a part of the signals, and keeps it: {100 * kept.coverage:.1f} % of the training rows."
    tell(f"{said} To use all of them, begin a new run with another --output.")
    return replace(stage, signals=kept)
