"""A run: the parts that it needs, and everything that decides its result.

`start_run` builds the run that `indra train` trains. `trial_run` builds the same run for a dry run or a range test: it
creates no folder, asks no teacher and does not resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from indraquantum.config import TeacherSettings, TrainSettings
from indraquantum.data.dataset import PreparedDataset, open_dataset
from indraquantum.data.same_tokenizer import require_same_tokenizer
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.files import sha256_of
from indraquantum.kernels.measured import way_for
from indraquantum.kernels.ways import in_force, put_in_force
from indraquantum.memory import memory_needed
from indraquantum.model.attention import SHORT, attend_as
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE, Processes
from indraquantum.progress import tell
from indraquantum.training.candidates import CandidateSampler
from indraquantum.training.checkpoint import (
    checkpoint_path,
    checkpoints_in,
    load_checkpoint,
    require_student,
    step_checkpoint_path,
)
from indraquantum.training.cooccurrence import bigram_table, cooccurrence_table
from indraquantum.training.engine import Engine
from indraquantum.training.guards import CollapseGuard
from indraquantum.training.optimizers import check_rates, new_optimizer
from indraquantum.training.parallel import Precision, SingleProcess, WeightAverage, choose_precision, make_parallel
from indraquantum.training.plan import Plan, RunStage, plan_run, tail_of
from indraquantum.training.schedule import ORDER
from indraquantum.training.signals import find_signals, folder_of, sha256_of_signals

# Settings that may change when a run resumes, because they do not change what it computes.
FREE_SETTINGS = {
    "output", "logs", "device", "threads", "data", "signals", "teacher", "tokenizer",
    "save_every", "keep_last", "resume", "on_collapse", "dry_run", "parallel", "gradient_checkpointing", "keep_best",
    "log_to", "minutes", "sample_every", "sample_prompt",
}  # fmt: skip

LENGTHS = ("minutes", "epochs", "max_steps", "steps")  # options of how long a run is

# Options that must be equal for the weights of one model to fit another, with their names in the model's configuration.
SHAPE = {
    "d-model": "d_model", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "mlp-width": "intermediate_size", "projector": "projector", "state-width": "complex_width",
    "magnitude": "magnitude", "ends": "ends", "residual": "residual",
    "residual-head": "residual_head", "head": "head", "bias": "bias",
    "readout": "readout",
}  # fmt: skip

LARGE_VOCABULARY = 8192  # with fewer tokens, comparing all of them takes little time

# The most shapes that compiled layers may get: the numbers of rows in micro-batches and evaluations, times layers.
MOST_SHAPES = 256


@dataclass
class BestHeldOut:
    """The best evaluation so far. It consists of plain values, so that a checkpoint can hold it."""

    cross_entropy: float | None = None  # of all held-out text, nats per token
    step: int = 0  # the step of this evaluation
    evaluations_since: int = 0
    stopped: bool = False  # whether --patience ends the run

    def take(self, step: int, cross_entropy: float, patience: int) -> bool:
        """Record an evaluation and return whether it is the best so far. A patience of 0 never stops the run."""
        if self.cross_entropy is None or cross_entropy < self.cross_entropy:
            self.cross_entropy, self.step, self.evaluations_since = cross_entropy, step, 0
            return True
        self.evaluations_since += 1
        self.stopped = 0 < patience <= self.evaluations_since
        return False


@dataclass
class Run:
    """Everything that one run carries from step to step."""

    settings: TrainSettings | TeacherSettings
    plan: Plan
    engine: Engine
    device: torch.device
    average: WeightAverage
    identity: dict[str, Any]  # what decides its result
    folder: Path  # the folder of its checkpoints
    name: str = "train"  # the name in the progress bar
    epoch_checkpoints: bool = True  # whether to evaluate at the end of each epoch and to keep a checkpoint of it
    keep_best: bool = False  # whether to keep the best checkpoint too
    patience: int = 0  # stop after this many evaluations without a better one; 0 never stops
    step: int = 0
    tokens: int = 0
    held_out: dict[str, float] | None = None  # the figures of the last evaluation
    pending: dict[str, Any] | None = None  # metrics of `step` that are not written yet
    best: BestHeldOut = field(default_factory=BestHeldOut)
    guard: CollapseGuard = field(default_factory=CollapseGuard)
    after_step: Callable[[Run], None] | None = None  # called after the metrics of each step, in the first process
    saved: bool = False  # whether a checkpoint holds the present state of the run

    def step_fits(self) -> contextlib.AbstractContextManager[None]:
        """Inside a step or a part of one, a lack of memory is an OutOfMemory that names --micro-batch-tokens."""
        allowed = f"must be smaller, because a step does not fit into the free memory of {self.device}"
        return memory_needed("--micro-batch-tokens", self.settings.micro_batch_tokens, allowed)

    @property
    def parallel(self) -> SingleProcess:
        """The model as this process and the others hold it."""
        return self.engine.parallel

    @property
    def model(self) -> nn.Module:
        """The model itself, an IndraQuantumPhase2 or another learner."""
        return self.engine.parallel.learner

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the model's weights."""
        return self.engine.optimizer

    @property
    def processes(self) -> Processes:
        """The processes of the run, as this one sees them."""
        return self.parallel.processes

    @property
    def dataset(self) -> PreparedDataset:
        """The dataset of the run; its validation split is the held-out text."""
        return self.plan.dataset

    @property
    def stage(self) -> RunStage:
        """The stage of the last finished step."""
        return self.plan.before(self.step)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.plan.total_steps

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or --patience stopped the run early."""
        return self.step == self.total_steps or self.best.stopped

    @property
    def at_milestone(self) -> bool:
        """Whether the run begins or ends at `step`, or a stage or an epoch ends there and is saved."""
        return self.finished or (self.plan.epoch_ends(self.step) if self.epoch_checkpoints else self.step == 0)

    @property
    def milestone_path(self) -> Path:
        """The path of the checkpoint of the next milestone, which may be at `step`."""
        if self.epoch_checkpoints:
            return checkpoint_path(self.folder, self.plan.epoch_of(self.step))
        return self.step_path

    @property
    def step_path(self) -> Path:
        """The path of a step checkpoint at `step`."""
        return step_checkpoint_path(self.folder, self.step)


def model_fits(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where a model and its optimiser are put on a device, a lack of memory is an OutOfMemory that names --device."""
    allowed = "must have free memory for the model; end other programs that use it, or choose a smaller model"
    return memory_needed("--device", device, allowed)


def start_run(
    settings: TrainSettings,
    plan: Plan,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    counts_text: bool = True,
    replaced: bool = False,
) -> Run:
    """Return a run at its first step, with seeded weights and a new optimiser. It is the same in all `processes`.

    Args:
        settings: the options of the command.
        plan: the steps of the run.
        device: where the weights are.
        processes: the processes that share the work.
        counts_text: whether --bias-start and --table-start may count the training text, which takes seconds. Not needed
            where the steps are only timed.
        replaced: whether the weights of the run's own checkpoint replace those of its start, which then need not exist.

    Raises:
        UserError: settings contradict each other, or ask for a compiler where none works.
        OutOfMemory: the model does not fit into the memory of the device.
    """
    weights = None if replaced else starting_weights(settings, plan)
    torch.manual_seed(settings.seed)
    with model_fits(device):
        model = IndraQuantumPhase2(model_config(settings, plan)).train()
        if weights is not None:
            model.load_state_dict(weights)
        elif counts_text and not replaced:
            _start_from_counts(model, settings, plan)
        accelerate(model, settings, device)
        # A stage without signals does not use the readout.
        precision, unused = choose_precision(settings, device), any(stage.signals is None for stage in plan.stages)
        choose_attention(model.backbone, plan, precision, device)
        parallel = make_parallel(settings.parallel, model, processes, device, unused=unused, precision=precision)
        average = WeightAverage(model, settings.ema_decay)
    return Run(
        settings=settings,
        plan=plan,
        engine=Engine(
            parallel,
            new_optimizer(model, settings, processes),
            settings.head,
            sampler_of(softmax_of(settings, plan), plan),
        ),
        device=device,
        average=average,
        # The lengths that were chosen for the minutes decide the run. The minutes are for a command that resumes it.
        identity=run_identity(settings, plan) | computed_by(precision) | {"minutes": settings.minutes},
        folder=settings.output,
        keep_best=settings.keep_best,
        patience=settings.patience,
    )


def choose_attention(backbone: PreTrainedModel, plan: Plan, precision: Precision, device: torch.device) -> None:
    """Let the layers of `backbone` compute attention in the way that is fastest for a new run."""
    is_short = all(stage.dataset.row_length < SHORT for stage in plan.stages)
    if device.type == "cpu" and precision.dtype is not torch.float32 and is_short:
        precision.attention = "eager"
        attend_as(backbone, "eager")


@torch.no_grad()
def _start_from_counts(model: IndraQuantumPhase2, settings: TrainSettings, plan: Plan) -> None:
    """Give the head's bias and the table what the training text says of each token, if `settings` ask for it."""
    if settings.bias_start == "frequencies" and model.bias_V is not None:
        model.bias_V.copy_(torch.from_numpy(log_frequencies(plan)))
    start = settings.table_start_or_default
    if start == "normal":
        return
    table_Vd = model.embedding.weight
    std = settings.table_std or model.projector.table_std
    texts = [stage.train for stage in plan.stages]
    if start == "cooccurrence":
        table_Vd.copy_(std * cooccurrence_table(texts, *table_Vd.shape, settings.seed))
    else:
        paired = min(table_Vd.shape[1], model.config.hidden_size)
        table_Vd.copy_(std * bigram_table(texts, *table_Vd.shape, paired, settings.seed))


def log_frequencies(plan: Plan) -> np.ndarray:
    """Return the logarithm of each token's frequency among the labels of `plan`, (V,); each counts one more."""
    counts_V = _label_counts(plan) + 1
    return np.log(counts_V / counts_V.sum())


def softmax_of(settings: TrainSettings, plan: Plan) -> Literal["exact", "sampled"]:
    """Return the softmax of a new run. auto takes sampled where the held-out losses were measured to be no worse."""
    if settings.softmax != "auto":
        return settings.softmax
    is_large = plan.dataset.tokenizer.vocabulary_size >= LARGE_VOCABULARY
    return "sampled" if is_large and settings.head != "born" else "exact"


def sampler_of(softmax: str, plan: Plan) -> CandidateSampler | None:
    """Return what chooses the tokens that each step compares; None if all are compared."""
    if softmax == "exact" or _is_born(plan.stages[0].settings):
        return None
    return CandidateSampler(_label_counts(plan))


def _is_born(settings: TrainSettings | TeacherSettings) -> bool:
    """Return whether the head is Born's rule, which compares all tokens."""
    return isinstance(settings, TrainSettings) and settings.head == "born"


def _label_counts(plan: Plan) -> np.ndarray:
    """Return how often the stages of `plan` predict each token, (V,)."""
    size = plan.dataset.tokenizer.vocabulary_size
    return np.sum([stage.train.label_counts(size) for stage in plan.stages], axis=0)


def trial_run(settings: TrainSettings, *, counts_text: bool = True, may_resume: bool = False) -> Run:
    """Return a run at its first step that writes no files. If signals are not captured yet, its stages have none.

    Args:
        settings: the options of the command.
        counts_text: as for `start_run`.
        may_resume: whether the checkpoint of --start-from need not exist if `indra train` would resume.

    Raises:
        UserError: settings, data or signals don't fit.
    """
    device = choose_device(settings)
    put_in_force(way_for(device))
    dataset = open_dataset("--data", settings.data, settings.tokenizer, verify=True)
    plan = find_signals(plan_run(settings, dataset))
    for folder in dict.fromkeys(folder_of(stage.settings) for stage in plan.stages if stage.lacks_signals):
        tell(f"No teacher signals at {folder}; this test continues without them. `indra train` captures them first.")
    replaced = may_resume and will_resume(settings, plan)
    return start_run(settings, plan, device, counts_text=counts_text, replaced=replaced)


def accelerate(model: IndraQuantumPhase2, settings: TrainSettings, device: torch.device) -> None:
    """Apply --gradient-checkpointing and --compile to the layers of `model`, in place.

    Raises:
        UserError: --compile is given, and no compiler works here.
    """
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if settings.compile:
        require_compiler(device)
        # The code for a shape must not depend on the shapes before it, or a resumed run would have other bits. So no
        # shape is dynamic, and the limit is high: beyond it, torch would continue without compiling.
        torch.compiler.config.recompile_limit = MOST_SHAPES
        for layer in model.backbone.layers:  # all layers are alike, so one compilation serves all
            layer.compile(dynamic=False)


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile works here, with a tiny function and its gradient.

    Raises:
        UserError: it fails; the message gives the reason.
    """
    weight = torch.ones(3, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sin() * x).sum())(weight).backward()
    except Exception as error:  # a compiler, a driver or a read-only cache may raise anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            "--compile", True, f"needs a working compiler, which is missing here ({reason}); leave it out"
        ) from None


def model_config(settings: TrainSettings, plan: Plan) -> IndraQuantumConfig:
    """Return the model's configuration for the data of `plan`."""
    tokenizer = plan.dataset.tokenizer
    return IndraQuantumConfig.from_settings(
        settings,
        vocab_size=tokenizer.vocabulary_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        max_position_embeddings=max(2048, *(stage.dataset.row_length for stage in plan.stages)),
    )


def check_settings(settings: TrainSettings, plan: Plan, device: torch.device) -> None:
    """Check the settings before anything is written and before a teacher is asked.

    Raises:
        UserError: settings contradict each other, a compiler is missing, or a checkpoint is missing or does not fit.
    """
    if not will_resume(settings, plan):
        starting_weights(settings, plan)
    with torch.device("meta"):
        model = IndraQuantumPhase2(model_config(settings, plan))
    check_rates(model, settings)
    if settings.compile:
        require_compiler(device)
    check_resume(settings.resume, settings.output, plan)


def will_resume(settings: TrainSettings, plan: Plan) -> bool:
    """Return whether a run of these settings resumes from a checkpoint, or fails because no checkpoint is valid."""
    if settings.resume == "auto":
        return bool(checkpoints_in(settings.output, plan.step_of_epoch))
    return settings.resume != "never"


def check_resume(resume: str, folder: Path, plan: Plan) -> None:
    """Check before a run begins that it can do what `--resume` asks for.

    Raises:
        UserError: the checkpoint does not exist, or `--resume never` is given and `folder` holds a checkpoint.
    """
    if resume == "never":
        refuse_checkpoints(folder, plan)
    elif resume != "auto" and not Path(resume).is_file():
        raise UserError("--resume", resume, "must be auto, never, or the path of a checkpoint")


def starting_weights(settings: TrainSettings, plan: Plan) -> dict[str, Tensor] | None:
    """Return the weights of the checkpoint that the strategy starts from, or None if it starts from none.

    If the checkpoint has a moving average, these are its weights, as everywhere else.

    Raises:
        UserError: the checkpoint is damaged, or its model has another shape or tokenizer.
    """
    path = plan.strategy.start_from
    if path is None:
        return None
    checkpoint = load_checkpoint("--start-from", path)
    require_student("--start-from", path, checkpoint)
    theirs = TextTokenizer.from_json(*(checkpoint.tokenizer[name] for name in ("json", "bos_id", "eos_id")))
    require_same_tokenizer("--start-from", path, "must have the tokenizer of --data", plan.dataset.tokenizer, theirs)
    ours, theirs = model_config(settings, plan), IndraQuantumConfig.from_dict(checkpoint.model_config)
    for option, name in SHAPE.items():
        if getattr(theirs, name) != getattr(ours, name):
            allowed = f"must be of a model with --{option} {getattr(ours, name)}, not {getattr(theirs, name)}"
            raise UserError("--start-from", path, allowed)
    return checkpoint.model | checkpoint.average


def refuse_checkpoints(folder: Path, plan: Plan) -> None:
    """Check that `folder` holds no checkpoint.

    Raises:
        UserError: it holds one.
    """
    if there := checkpoints_in(folder, plan.step_of_epoch):
        allowed = f"must be auto, because {folder} holds {there[0][1].name}; or give another --output"
        raise UserError("--resume", "never", allowed)


def run_identity(settings: TrainSettings, plan: Plan) -> dict[str, Any]:
    """Return what decides a run's result, as plain values: options, content of data and signals, resolved strategy.

    If the device chooses the precision, its value here is "auto".
    """
    # The names of the strategy and of the checkpoint are replaced by their content.
    chosen = settings.model_dump(mode="json", exclude=FREE_SETTINGS | {"strategy", "start_from"})
    start = plan.strategy.start_from
    return {
        **chosen,
        **settings.decided(),
        "tail": _tail(settings, plan),
        "softmax": softmax_of(settings, plan),
        "data": plan.dataset.content_sha256,
        "start_from": sha256_of(start) if start and start.is_file() else None,  # a resumed run needs no file
        "stages": {stage.spec.name: stage_identity(stage, plan) for stage in plan.stages},
        "signals": own_signals_sha256(plan),  # after the weights, which say more if they are why the signals differ
    }


def own_signals_sha256(plan: Plan) -> str | None:
    """Return the SHA-256 of the signals for the dataset of `plan`; None if no stage uses any."""
    own = (stage.signals for stage in plan.stages if stage.dataset is plan.dataset and stage.signals is not None)
    return next(map(sha256_of_signals, own), None)


COMPUTED_BY = ("precision", "objective_precision", "attention_precision", "row_order", "products")


def computed_by(precision: Precision) -> dict[str, Any]:
    """Return what else decides the bits of a run: number formats, rule for the order of rows, way of the products."""
    values = precision.name, precision.name_of_objective, precision.attention, ORDER, str(in_force())
    return dict(zip(COMPUTED_BY, values, strict=True))


def _tail(settings: TrainSettings, plan: Plan) -> str:
    """Return what the objective does with the probability that truncated signals don't store."""
    if settings.tail == "auto" and not any(stage.has_truncated_signals for stage in plan.stages):
        return "none"
    return tail_of(settings)


def stage_identity(stage: RunStage, plan: Plan) -> dict[str, Any]:
    """Return what decides the steps of `stage`, as plain values."""
    lengths = {"fraction", "epochs", "steps"}  # `steps` is the number of steps that results from them
    stated = stage.spec.model_dump(mode="json", exclude={"name", "only_from_scratch", "data", "signals", *lengths})
    if stage.dataset is not plan.dataset:
        signals = None if stage.signals is None else sha256_of_signals(stage.signals)
        stated |= {"data": stage.dataset.content_sha256, "signals": signals}
    planned = {} if stage.planned_steps is None else {"planned_steps": stage.planned_steps}
    return {**stated, "steps": stage.steps, **planned}
