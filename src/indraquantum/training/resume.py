"""Resumes a run from a checkpoint, if the checkpoint belongs to the same run.

A run may also resume with another length. It keeps its optimiser's state:

    indra train --schedule constant --epochs 1 ...
    indra train --schedule constant --epochs 3 ...      the same command, longer

The finished steps must not depend on the run's length. So the schedule of the current stage must be constant, or wsd
that has not begun to decay. The warm-up and the curves of the loss weights keep the length that the stage began with.
The added steps have the last weights of these curves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum.config import RunSettings, TeacherSettings, TrainSettings
from indraquantum.errors import UserError, as_option
from indraquantum.kernels.ways import continued, put_in_force
from indraquantum.model.attention import attend_as
from indraquantum.progress import tell
from indraquantum.strategy import RATES
from indraquantum.training.checkpoint import (
    BEST_NAME,
    Checkpoint,
    DamagedCheckpoint,
    Found,
    checkpoints_in,
    load_checkpoint,
    newest_checkpoint,
    require_model_type,
    save_checkpoint,
    set_aside,
)
from indraquantum.training.earlier import CHANGED_DEFAULTS, with_defaults
from indraquantum.training.folders import is_elsewhere
from indraquantum.training.guards import CollapseGuard
from indraquantum.training.parallel import DTYPES, scattered, scattered_optimizer
from indraquantum.training.plan import Plan, RunStage
from indraquantum.training.run import (
    LENGTHS,
    BestHeldOut,
    Run,
    model_fits,
    own_signals_sha256,
    refuse_checkpoints,
    sampler_of,
    stage_identity,
    will_resume,
)
from indraquantum.training.schedule import decay_begins
from indraquantum.training.signals import folder_of, how_to_name, option_of, with_shards

STAGE_LENGTHS = ("steps", "planned_steps")  # in a stage's identity


def resume(run: Run) -> bool:
    """Restore `run` from the checkpoint that its settings ask for. Return False if there is none.

    Raises:
        UserError: the checkpoint is damaged or comes from a run with other settings, `--resume never` is given and the
            folder holds one, or `--resume PATH` is given and the folder holds another run.
    """
    processes, read = run.processes, []

    def choose() -> Path | None:
        read.append(_wanted_checkpoint(run.settings.resume, run.folder, run.plan))
        if read[0] is not None and is_elsewhere(read[0].path, run.folder):
            require_model_type("--resume", read[0].path, read[0].checkpoint, run.model.config.model_type)
            _require_its_folder(run, read[0])
        return read[0] and read[0].path

    path = processes.first(choose)
    if path is None:
        return False
    with processes.together():  # the other processes read and verify the file too
        field = "--output" if run.settings.resume == "auto" else "--resume"
        checkpoint = read[0].checkpoint if read else load_checkpoint(field, path)
        require_model_type(field, path, checkpoint, run.model.config.model_type)
        restore(run, checkpoint)
    processes.first(lambda: _go_back(run, path, checkpoint))
    if not run.finished:
        tell(f"Resuming from step {run.step} of {run.total_steps}.")
    elif run.step < run.total_steps:
        tell(f"--patience stopped this run early. To train it further, use --start-from {path} --output NEW")
    if run.total_steps != run.plan.planned_steps:
        tell(f"The run began with {run.plan.planned_steps} steps. Its warm-up and loss weights keep that length.")
    return True


def require_signals(settings: TrainSettings, plan: Plan) -> None:
    """Check before a capture, which may take hours, that the run to resume did not begin with other signals or none.

    Raises:
        UserError: it began with signals that are not there now, or without any; or no checkpoint is valid.
    """
    lacking = [stage for stage in plan.stages if stage.lacks_signals]
    if not lacking or not will_resume(settings, plan):
        return
    if (found := _wanted_checkpoint(settings.resume, settings.output, plan)) is None:
        return
    before = found.checkpoint.settings
    if before.get("no_teacher"):
        raise UserError("--no-teacher", False, as_there(settings, settings.output, True))
    which = _which_run(settings, settings.output)
    for stage in lacking:
        if _signals_before(stage, plan, before) is not None:
            allowed = f"must hold the signals that {which} began with; give their folder {how_to_name(stage)}"
            raise UserError(option_of(stage), folder_of(stage.settings), f"{allowed}, or give another --output")
    allowed = (
        f"needs signals in stage {lacking[0].spec.name}, but {which} began without them, in the stages "
        f"{', '.join(before['stages'])}; give the strategy and the weights of that run, or another --output"
    )
    raise UserError("--strategy", settings.strategy, allowed)


def _signals_before(stage: RunStage, plan: Plan, before: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the signals that `stage` had in an earlier part of the run; None if it had none."""
    if stage.dataset is plan.dataset:
        return before.get("signals")
    return before.get("stages", {}).get(stage.spec.name, {}).get("signals")


def _wanted_checkpoint(wanted: str, folder: Path, plan: Plan) -> Found | None:
    """Return the checkpoint of --resume `wanted` for a run in `folder`, or None to begin a new run."""
    if wanted == "never":
        refuse_checkpoints(folder, plan)
        return None
    if wanted == "auto":
        return newest_checkpoint(folder, plan.step_of_epoch)
    return Found(Path(wanted), load_checkpoint("--resume", Path(wanted)))


def _require_its_folder(run: Run, found: Found) -> None:
    """Check that the folder of `run` holds no other run than that of `found`, whose files it would mix with its own.

    Raises:
        UserError: it holds one.
    """
    for _, path in checkpoints_in(run.folder, run.plan.step_of_epoch):
        with contextlib.suppress(DamagedCheckpoint):
            there, ours = (
                (with_defaults(checkpoint.settings, run.identity, type(run.settings)), checkpoint.step)
                for checkpoint in (load_checkpoint("--output", path), found.checkpoint)
            )
            if (of := _other_run(run.plan, there, ours)) is not None:
                allowed = f"must be empty, or hold the run of --resume {found.path}; it holds one {of}"
                raise UserError("--output", run.folder, allowed)
            return


def _other_run(plan: Plan, there: tuple[dict[str, Any], int], ours: tuple[dict[str, Any], int]) -> str | None:
    """Say how the run of one checkpoint differs from that of another, or return None if it is the same.

    Args:
        plan: the plan of the run that resumes.
        there: what decides the run in the folder, and a step of it.
        ours: the same of the checkpoint to resume from.
    """
    (theirs, done), (wanted, step) = there, ours
    if (stages := list(theirs["stages"])) != list(wanted["stages"]):
        return f"with the stages {', '.join(stages)}"
    if (difference := first_difference(without_length(theirs), without_length(wanted))) is not None:
        option, value = difference.option_and_value()
        return f"with {option} {value[:60]}"
    if stages == [stage.spec.name for stage in plan.stages]:
        try:
            extended(plan, theirs, min(done, step))
        except NotExtensible:
            return "of another length"
    return None


def _go_back(run: Run, used: Path, checkpoint: Checkpoint) -> None:
    """Set later checkpoints aside when a run goes back to an earlier one. They would be ahead of the metrics.

    Args:
        run: the run, restored.
        used: the path that it was restored from.
        checkpoint: what is there. Automatic resume must find it too, even if it has the name of the best one.
    """
    there = checkpoints_in(run.folder, run.plan.step_of_epoch)
    from_path = run.settings.resume != "auto"
    if from_path and (is_elsewhere(used, run.folder) or run.step not in (step for step, _ in there)):
        save_checkpoint(run.step_path, checkpoint)
    later = [path for step, path in there if step > run.step]
    best = run.folder / BEST_NAME
    # Automatic resume may find one that is ahead too, after a crash. Then the same steps will write it again.
    if from_path and best.exists() and _is_ahead(best, run.step):
        later.append(best)
    set_aside(path for path in later if path.resolve() != used.resolve())


def _is_ahead(path: Path, step: int) -> bool:
    """Return whether the checkpoint at `path`, whose name does not tell its step, is later than `step`, or damaged."""
    try:
        return load_checkpoint("--output", path).step > step
    except DamagedCheckpoint:
        return True


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Give `run` the state of `checkpoint`.

    The checkpoint may be older than an option. The option then counts as what the program did before it had it. Options
    of CHANGED_DEFAULTS that are not given keep the value with which the run began.

    Raises:
        UserError: the checkpoint comes from a run with other settings; the message names the first that differs.
    """
    before, kept = with_defaults(checkpoint.settings, run.identity, type(run.settings)), {}
    if isinstance(run.settings, TrainSettings):
        _keep_start(run, before)
        _keep_signals(run, before, checkpoint.signal_shards)
    if "tail" in run.identity:
        if run.settings.tail == "auto":
            run.identity["tail"] = before["tail"]
        kept["tail"] = run.identity["tail"]
    kept |= _keep_older_defaults(run, before)
    if "softmax" in run.identity and run.settings.softmax == "auto":
        run.identity["softmax"] = before["softmax"]
        run.engine.sampler = sampler_of(before["softmax"], run.plan)
    for name in ("row_order", "objective_precision", "attention_precision"):
        run.identity[name] = before[name]
    way = continued(before.get("products"), "--resume")
    put_in_force(way)
    run.identity["products"] = before["products"] = str(way)
    now, then = (", ".join(settings["stages"]) for settings in (run.identity, checkpoint.settings))
    if now != then:
        raise UserError("--strategy", f"stages {now}", as_there(run.settings, run.folder, then))
    if (found := first_difference(without_length(run.identity), without_length(before))) is not None:
        raise _refused(run, found)
    try:
        plan = extended(run.plan, before, checkpoint.step)
    except NotExtensible as error:
        raise _not_extensible(run, before, error) from None
    run.plan = replace(
        plan,
        stages=tuple(
            replace(stage, order=before["row_order"], settings=_settings_of(stage, kept)) for stage in plan.stages
        ),
    )
    run.identity["stages"] = {stage.spec.name: stage_identity(stage, run.plan) for stage in run.plan.stages}
    with model_fits(run.device):
        run.model.load_state_dict(scattered(checkpoint.model, run.model.state_dict()))
        run.optimizer.load_state_dict(scattered_optimizer(checkpoint.optimizer, run.optimizer))
        run.average.load(scattered(checkpoint.average, run.average.weights))
    run.step, run.tokens, run.pending, run.saved = checkpoint.step, checkpoint.tokens, checkpoint.pending, True
    run.guard, run.best = CollapseGuard(**checkpoint.guard), BestHeldOut(**checkpoint.best)
    precision = run.parallel.precision
    precision.use(DTYPES[before["precision"]])
    precision.objective, precision.attention = DTYPES[before["objective_precision"]], before["attention_precision"]
    attend_as(run.model.backbone, precision.attention)
    precision.scaler.load_state_dict(checkpoint.loss_scale)


def _keep_start(run: Run, before: Mapping[str, Any]) -> None:
    """Let `run` resume without the checkpoint that it started from, whose weights it needs no more.

    Raises:
        UserError: it is given another one; or none, although the strategy then has more stages.
    """
    path, now, then = run.plan.strategy.start_from, run.identity["start_from"], before.get("start_from")
    if then is None:
        if path is not None:
            raise UserError("--start-from", path, as_there(run.settings, run.folder, None))
        return
    has_more_stages = any(stage.spec.only_from_scratch for stage in run.plan.stages)
    if has_more_stages or now not in (None, then):
        allowed = (
            f"must be the checkpoint that {_which_run(run.settings, run.folder)} started from; if that is gone or was "
            "replaced, give a path without a file, because the run needs it no more"
        )
        raise UserError("--start-from", path or "nothing", allowed)
    run.identity["start_from"] = then


def _keep_signals(run: Run, before: Mapping[str, Any], shards: Mapping[str, list[str]]) -> None:
    """Let each stage of `run` use exactly the shards of signals that it began with, if their capture has gone on since.

    Args:
        run: the run to resume.
        before: what decided the run so far.
        shards: the shards that it began with, as in its checkpoint.
    """
    stages = []
    for stage in run.plan.stages:
        wanted = shards.get(_signals_before(stage, run.plan, before) or "")
        if stage.signals is not None and wanted is not None:
            stage = with_shards(stage, stage.signals, wanted)
        stages.append(stage)
    run.plan = replace(run.plan, stages=tuple(stages))
    run.identity["signals"] = own_signals_sha256(run.plan)


def _keep_older_defaults(run: Run, before: Mapping[str, Any]) -> dict[str, Any]:
    """Give `run` the earlier values of options that it was not given and whose default has changed. Return them."""
    names = [name for name in CHANGED_DEFAULTS if name in run.identity and name not in run.settings.model_fields_set]
    # float16 needs a loss scale, which a run in another format does not have.
    older = {name: before[name] for name in names if before[name] != "float16"}
    stages = []
    for stage in run.plan.stages:
        then = before["stages"].get(stage.spec.name, {})
        # A stage may have a value of its own, from its strategy.
        own = {name: value for name, value in older.items() if then.get(name) == value}
        stages.append(replace(stage, spec=stage.spec.model_copy(update=own)))
    run.plan = replace(run.plan, stages=tuple(stages))
    run.identity |= older
    run.identity["stages"] = {stage.spec.name: stage_identity(stage, run.plan) for stage in run.plan.stages}
    return older


def _settings_of(stage: RunStage, kept: Mapping[str, Any]) -> TrainSettings | TeacherSettings:
    """Return the settings of a stage with `kept` of its run. Learning rates and schedule may be the stage's own."""
    own = {name: getattr(stage.spec, name) for name in RATES}
    return stage.settings.model_copy(update={**kept, **own})


def _refused(run: Run, found: Difference) -> UserError:
    """Return the error for a run that can't resume because of the difference `found`."""
    option, value = found.option_and_value()
    if found.path[-1] == "signals" and found.now is not None and found.then is not None:
        asking = [stage for stage in run.plan.stages if stage.signals is not None]
        stage = next(stage for stage in asking if _signals_before(stage, run.plan, run.identity) == found.now)
        allowed = (
            f"must hold exactly the signals that {_which_run(run.settings, run.folder)} began with; if their capture "
            "has gone on since, begin a new run with another --output"
        )
        return UserError(option_of(stage), folder_of(stage.settings), allowed)
    return UserError(option, value, as_there(run.settings, run.folder, found.then))


def as_there(settings: RunSettings, folder: Path, then: Any) -> str:
    """Say what an option must be, so that the run can resume from its checkpoint."""
    must = "must be left out" if then is None else f"must be {then}"
    other = ", or give another --output" if settings.resume == "auto" else ""
    return f"{must}, as in {_which_run(settings, folder)}{other}"


def _which_run(settings: RunSettings, folder: Path) -> str:
    return f"the run that {folder} holds" if settings.resume == "auto" else f"the run of --resume {settings.resume}"


def _not_extensible(run: Run, before: Mapping[str, Any], error: NotExtensible) -> UserError:
    """Return the error for a run that can't have the requested length. It says why, and what to do instead."""
    settings = run.settings
    option, value, then = "--strategy", f"{run.total_steps:,} steps", "of the same length"
    for name in LENGTHS:
        if before.get(name) != getattr(settings, name, None):
            option, value, then = as_option(name), getattr(settings, name), before[name]
    there = checkpoints_in(run.folder, run.plan.step_of_epoch)
    early = [path for step, path in there if step <= error.before]
    newest = there[0][1] if settings.resume == "auto" and there else settings.resume
    ways = [f"resume from before that with --resume {early[0]}"] if early else []
    if "start_from" in type(settings).model_fields:
        ways.append(f"begin a new run from its weights with --start-from {newest} --output NEW")
    way_out = f". To train it further, {', or '.join(ways)}" if ways else ""
    which = _which_run(settings, run.folder)
    return UserError(option, value, f"must be {then}, as in {which}: {error.why}{way_out}")


class Difference(NamedTuple):
    """Where two trees of plain values differ."""

    path: tuple[str, ...]  # the names that lead there
    now: Any
    then: Any

    def option_and_value(self) -> tuple[str, str]:
        """Return the option that differs, and its value."""
        name, *place = self.path
        if name == "stages":
            return "--strategy", f"{'.'.join(place)} {self.now}"
        return as_option(name), str(self.now)


def first_difference(now: Any, then: Any, path: tuple[str, ...] = ()) -> Difference | None:
    """Return where `now` first differs from `then`, or None if they are equal."""
    if isinstance(now, dict) and isinstance(then, dict):
        names = (*now, *(name for name in then if name not in now))
        found = (first_difference(now.get(name), then.get(name), (*path, name)) for name in names)
        return next((difference for difference in found if difference is not None), None)
    return None if now == then else Difference(path, now, then)


class NotExtensible(Exception):
    """A run can't have another length.

    Args:
        why: the reason, as a clause of the message.
        before: the run could have another length until this step; 0 if it never could.
    """

    def __init__(self, why: str, before: int = 0) -> None:
        self.why, self.before = why, before
        super().__init__(why)


def without_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a run, without its length."""
    stages = {
        name: {key: value for key, value in stage.items() if key not in STAGE_LENGTHS}
        for name, stage in identity["stages"].items()
    }
    return {name: value for name, value in identity.items() if name not in LENGTHS} | {"stages": stages}


def extended(plan: Plan, before: Mapping[str, Any], step: int) -> Plan:
    """Return `plan` as the continuation of a run after `step` steps. The run may have begun with another length.

    Args:
        plan: a plan with the requested length.
        before: what decided the run so far; it has the same stages.
        step: the number of finished optimiser steps.

    Raises:
        NotExtensible: with the requested length, the finished steps would have been different.
    """
    stages = []
    for stage in plan.stages:
        then = before["stages"][stage.spec.name]
        done = step - stage.first
        if done > 0 and then["steps"] != stage.steps:
            _check(stage, then["steps"], done)
        # A stage that has not begun takes the requested length.
        planned = then.get("planned_steps", then["steps"]) if done > 0 else None
        stages.append(replace(stage, planned_steps=None if planned == stage.steps else planned))
    return replace(plan, stages=tuple(stages))


def _check(stage: RunStage, steps_then: int, done: int) -> None:
    name, schedule = stage.spec.name, stage.spec.schedule
    if done > steps_then:
        raise NotExtensible(f"its stage {name} is over")
    if done > stage.steps:
        raise NotExtensible(f"it has done {stage.first + done:,} steps already")
    if schedule == "cosine":
        raise NotExtensible("its cosine schedule is tied to its length")
    if schedule == "wsd":
        begin = min(decay_begins(steps, stage.spec.decay_fraction) for steps in (steps_then, stage.steps))
        if done > begin:
            raise NotExtensible(f"its learning rate decays from step {stage.first + begin:,} on", stage.first + begin)
