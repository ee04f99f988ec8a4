"""A run and what decides it: its parts, its identity, and how it is put where a checkpoint stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from indraquantum.config import TrainSettings
from indraquantum.data.dataset import PreparedDataset
from indraquantum.data.same_tokenizer import require_same_tokenizer
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.files import combined_sha256, sha256_of
from indraquantum.kernels.ways import continued, in_force, put_in_force
from indraquantum.loss_v2 import SemanticDistillationLoss
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE, Processes
from indraquantum.teacher.signals import SignalStore
from indraquantum.training.acceleration import accelerate, require_compiler
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
from indraquantum.training.extension import LENGTHS, NotExtensible, extended, without_length
from indraquantum.training.optimizers import check_rates, new_optimizer
from indraquantum.training.parallel import Alone, make_parallel, scattered, scattered_optimizer
from indraquantum.training.precision import choose_precision
from indraquantum.training.schedule import ORDER
from indraquantum.training.stages import RunStage, StagePlan

# What may change between two starts of one run without changing what it computes.
FREE_SETTINGS = {
    "output", "logs", "device", "threads", "data", "signals", "teacher", "tokenizer",
    "save_every", "keep_last", "resume", "on_collapse", "dry_run", "parallel", "gradient_checkpointing", "keep_best",
    "log_to",
}  # fmt: skip

# What the program did before it had an option, where that is not the option's default.
BEFORE_THE_OPTION = {"tail": "none", "row_order": 1}

# What two models must share for the weights of one to fit the other: option, and its name in the model's configuration.
SHAPE = {
    "d-model": "d_model", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "mlp-width": "intermediate_size", "projector": "projector", "magnitude": "magnitude", "ends": "ends",
    "residual": "residual", "head": "head", "readout": "readout",
}  # fmt: skip


@dataclass
class Run:
    """Everything that one run carries from step to step."""

    settings: TrainSettings
    plan: StagePlan
    model: IndraQuantumPhase2
    parallel: Alone  # the model in the hands of this process and the others
    optimizer: torch.optim.Optimizer
    device: torch.device
    objective: SemanticDistillationLoss
    average: WeightAverage
    identity: dict[str, Any]
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
    def dataset(self) -> PreparedDataset:
        """The dataset of the run, whose validation side is held out."""
        return self.plan.dataset

    @property
    def stage(self) -> RunStage:
        """The stage of the step that was done last."""
        return self.plan.before(self.step)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.plan.total_steps

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or the run was stopped early."""
        return self.step == self.total_steps or self.best.stopped

    @property
    def epoch_ends(self) -> bool:
        """Whether `step` is the last of an epoch, of a stage, or of the run."""
        return self.plan.epoch_ends(self.step) or self.finished

    @property
    def epoch_path(self) -> Path:
        """Where the checkpoint of the epoch that `step` is in stands."""
        return checkpoint_path(self.settings.output, self.plan.epoch_of(self.step))


def start_run(settings: TrainSettings, plan: StagePlan, device: torch.device, processes: Processes = ALONE) -> Run:
    """A run at its first step: seeded weights, fresh optimiser; the same in each of `processes`.

    Raises:
        UserError: settings contradict each other, or ask for a compiler where none works.
    """
    weights = starting_weights(settings, plan)
    torch.manual_seed(settings.seed)
    model = IndraQuantumPhase2(model_config(settings, plan)).to(device).train()
    if weights is not None:
        model.load_state_dict(weights)
    accelerate(model, settings, device)
    # Without signals nothing looks at the readout.
    precision, unused = choose_precision(settings, device), any(stage.signals is None for stage in plan.stages)
    parallel = make_parallel(settings.parallel, model, processes, device, unused=unused, precision=precision)
    return Run(
        settings=settings,
        plan=plan,
        model=model,
        parallel=parallel,
        optimizer=new_optimizer(model, settings, processes),
        average=WeightAverage(model, settings.ema_decay),
        device=device,
        # Its weights, temperature and tail are set at each step.
        objective=SemanticDistillationLoss(kd_weight=0.0, phase_weight=0.0, magnitude_weight=0.0, head=settings.head),
        identity=run_identity(settings, plan)
        | {"precision": precision.name, "row_order": ORDER, "products": str(in_force())},
    )


def model_config(settings: TrainSettings, plan: StagePlan) -> IndraQuantumConfig:
    """The model's configuration for the data of `plan`."""
    tokenizer = plan.dataset.tokenizer
    return IndraQuantumConfig.from_settings(
        settings,
        vocab_size=tokenizer.vocabulary_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        max_position_embeddings=max(2048, *(stage.dataset.row_length for stage in plan.stages)),
    )


def check_settings(settings: TrainSettings, plan: StagePlan, device: torch.device) -> None:
    """Refuse what no run can begin with, before anything is written and before a teacher is asked.

    Raises:
        UserError: settings that contradict each other, no compiler, or a checkpoint that is missing or does not fit.
    """
    starting_weights(settings, plan)
    with torch.device("meta"):
        model = IndraQuantumPhase2(model_config(settings, plan))
    check_rates(model, settings)
    if settings.compile:
        require_compiler(device)
    if settings.resume == "never":
        _refuse_checkpoints(settings, plan)
    elif settings.resume != "auto" and not Path(settings.resume).is_file():
        raise UserError("--resume", settings.resume, "must be auto, never, or the path of a checkpoint")


def starting_weights(settings: TrainSettings, plan: StagePlan) -> dict[str, Tensor] | None:
    """The weights of the checkpoint that the strategy starts from; None where it starts from none.

    Raises:
        UserError: the checkpoint is damaged, or of a model of another shape or tokenizer.
    """
    path = plan.strategy.start_from
    if path is None:
        return None
    checkpoint = load_checkpoint("--start-from", path)
    theirs = TextTokenizer.from_json(*(checkpoint.tokenizer[name] for name in ("json", "bos_id", "eos_id")))
    require_same_tokenizer("--start-from", path, "must have the tokenizer of --data", plan.dataset.tokenizer, theirs)
    ours, theirs = model_config(settings, plan), IndraQuantumConfig.from_dict(checkpoint.model_config)
    for option, name in SHAPE.items():
        if getattr(theirs, name) != getattr(ours, name):
            allowed = f"must be of a model with --{option} {getattr(ours, name)}, not {getattr(theirs, name)}"
            raise UserError("--start-from", path, allowed)
    return checkpoint.model


def run_identity(settings: TrainSettings, plan: StagePlan) -> dict[str, Any]:
    """What decides a run's result, as plain values: options, content of data and signals, the resolved strategy.

    A precision that the device chooses stands as "auto".
    """
    # In place of the strategy's and the checkpoint's names stands what they hold.
    chosen = settings.model_dump(mode="json", exclude=FREE_SETTINGS | {"strategy", "start_from"})
    start = plan.strategy.start_from
    own = [stage.signals for stage in plan.stages if stage.dataset is plan.dataset and stage.signals is not None]
    return {
        **chosen,
        "tail": _tail(settings, plan),
        "data": plan.dataset.content_sha256,
        "signals": _signals_sha256(own[0]) if own else None,
        "start_from": start and sha256_of(start),
        "stages": {stage.about.name: _stage_identity(stage, plan) for stage in plan.stages},
    }


def _tail(settings: TrainSettings, plan: StagePlan) -> str:
    """What becomes of the probability that truncated signals don't hold."""
    if settings.tail != "auto":
        return settings.tail
    return "bucket" if any(stage.has_truncated_signals for stage in plan.stages) else "none"


def _stage_identity(stage: RunStage, plan: StagePlan) -> dict[str, Any]:
    lengths = {"fraction", "epochs", "steps"}  # what came of them is `steps`
    stated = stage.about.model_dump(mode="json", exclude={"name", "only_from_scratch", "data", "signals", *lengths})
    if stage.dataset is not plan.dataset:
        signals = None if stage.signals is None else _signals_sha256(stage.signals)
        stated |= {"data": stage.dataset.content_sha256, "signals": signals}
    planned = {} if stage.planned_steps is None else {"planned_steps": stage.planned_steps}
    return {**stated, "steps": stage.steps, **planned}


def _signals_sha256(signals: SignalStore) -> str:
    return combined_sha256(entry.sha256 for entry in signals.manifest.shards)


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
    elif run.step < run.total_steps:
        print(f"This run stopped early, by --patience; --start-from {path} --output NEW trains on from its weights.")
    if run.total_steps != run.plan.planned_steps:
        print(f"The run was begun with {run.plan.planned_steps} steps: warm-up and loss weights keep to that length.")
    return True


def _wanted_checkpoint(run: Run) -> Found | None:
    """The checkpoint that the settings ask for, None to start afresh."""
    output, wanted = run.settings.output, run.settings.resume
    if wanted == "never":
        _refuse_checkpoints(run.settings, run.plan)
        return None
    if wanted == "auto":
        return newest_checkpoint(output, run.plan.step_of_epoch)
    return Found(Path(wanted), load_checkpoint("--resume", Path(wanted)))


def _refuse_checkpoints(settings: TrainSettings, plan: StagePlan) -> None:
    if there := checkpoints_in(settings.output, plan.step_of_epoch):
        allowed = f"must be auto: {settings.output} holds {there[0][1].name}; or another --output"
        raise UserError("--resume", settings.resume, allowed)


def _set_later_ones_aside(run: Run, used: Path) -> None:
    """After going back on purpose: later checkpoints would be ahead of the metrics."""
    later = (
        path
        for step, path in checkpoints_in(run.settings.output, run.plan.step_of_epoch)
        if step > run.step and path.resolve() != used.resolve()
    )
    set_aside(later)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Give `run` the state of `checkpoint`; an option that the program did not have then counts as what it did then.

    Raises:
        UserError: the checkpoint is of a run with other settings; the first that differs is named.
    """
    before = with_defaults(checkpoint.settings, run.identity)
    if run.settings.tail == "auto":
        run.identity["tail"] = before["tail"]
    run.identity["row_order"] = before["row_order"]
    way = continued(before.get("products"), "--resume")
    put_in_force(way)
    run.identity["products"] = before["products"] = str(way)
    if (found := first_difference(without_length(run.identity), without_length(before))) is not None:
        raise UserError(*found.option_and_value(), _as_there(run, found.then))
    now, then = (", ".join(settings["stages"]) for settings in (run.identity, checkpoint.settings))
    if now != then:
        raise UserError("--strategy", f"stages {now}", _as_there(run, then))
    try:
        plan = extended(run.plan, before, checkpoint.step)
    except NotExtensible as error:
        raise _not_extensible(run, before, error) from None
    run.plan = replace(plan, stages=tuple(replace(stage, order=before["row_order"]) for stage in plan.stages))
    run.identity["stages"] = {stage.about.name: _stage_identity(stage, run.plan) for stage in run.plan.stages}
    run.model.load_state_dict(scattered(checkpoint.model, run.model.state_dict()))
    run.optimizer.load_state_dict(scattered_optimizer(checkpoint.optimizer, run.optimizer))
    run.step, run.tokens, run.pending, run.saved = checkpoint.step, checkpoint.tokens, checkpoint.pending, True
    run.guard, run.best = CollapseGuard(**checkpoint.guard), BestHeldOut(**checkpoint.best)
    run.average.load(scattered(checkpoint.average, run.average.weights))
    run.parallel.precision.scaler.load_state_dict(checkpoint.loss_scale)


def _as_there(run: Run, then: Any) -> str:
    """What an option must be for the run to go on from its checkpoint."""
    if run.settings.resume == "auto":
        return f"must be {then}, as in the run that {run.settings.output} holds, or give another --output"
    return f"must be {then}, as in the run of --resume {run.settings.resume}"


def _not_extensible(run: Run, before: Mapping[str, Any], error: NotExtensible) -> UserError:
    """What to say where the run can't have the length that is asked for: why, and the ways on."""
    settings = run.settings
    option, value, then = "--strategy", f"{run.total_steps:,} steps", "of the same length"
    for name in LENGTHS:
        if before[name] != getattr(settings, name):
            option, value, then = f"--{name.replace('_', '-')}", getattr(settings, name), before[name]
    there = checkpoints_in(settings.output, run.plan.step_of_epoch)
    early = [path for step, path in there if step <= error.before]
    newest = there[0][1] if settings.resume == "auto" and there else settings.resume
    ways = [f"resume from before that with --resume {early[0]}"] if early else []
    ways.append(f"begin a new run from its weights with --start-from {newest} --output NEW")
    which = f"the run that {settings.output} holds" if settings.resume == "auto" else "the run of --resume"
    return UserError(option, value, f"must be {then}, as in {which}: {error.why}. To train on, {', or '.join(ways)}")


def with_defaults(then: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What decided an earlier run, with what the program did for each option among `names` that it did not have then.

    That is the option's default, except where the default became another when the option came.
    """
    defaults = {name: field.default for name, field in TrainSettings.model_fields.items()} | BEFORE_THE_OPTION
    return {name: defaults[name] for name in names if name in defaults} | dict(then)


class Difference(NamedTuple):
    """Where two trees of plain values differ."""

    path: tuple[str, ...]  # names on the way there
    now: Any
    then: Any

    def option_and_value(self) -> tuple[str, str]:
        """What to tell a user to have given."""
        name, *place = self.path
        if name == "stages":
            return "--strategy", f"{'.'.join(place)} {self.now}"
        return f"--{name.replace('_', '-')}", str(self.now)


def first_difference(now: Any, then: Any, path: tuple[str, ...] = ()) -> Difference | None:
    """Where `now` first differs from `then`; None where it does not."""
    if isinstance(now, dict) and isinstance(then, dict):
        names = (*now, *(name for name in then if name not in now))
        found = (first_difference(now.get(name), then.get(name), (*path, name)) for name in names)
        return next((difference for difference in found if difference is not None), None)
    return None if now == then else Difference(path, now, then)
