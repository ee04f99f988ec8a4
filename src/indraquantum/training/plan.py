"""The plan of a run: it says what each optimiser step does, as a pure function of the step's number.

    plan = plan_run(settings, dataset)
    print(plan.step(0))             # a StepInput: rows, signals, loss weights, learning rate
    print(plan)                     # a line for each stage

A strategy describes the stages, and the plan applies it to a dataset. Steps are counted over the whole run, from 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from indraquantum.config import TeacherSettings, TrainSettings
from indraquantum.data.dataset import PreparedDataset, open_dataset
from indraquantum.data.packing import part_of_sources
from indraquantum.data.same_tokenizer import require_same_control_tokens, require_same_tokenizer
from indraquantum.data.split import Split
from indraquantum.errors import UserError
from indraquantum.kernels.arguments import Tail
from indraquantum.strategy import RATES, TEACHER_TERMS, Stage, Strategy, resolve
from indraquantum.teacher.signals import SignalStore
from indraquantum.training.schedule import (
    ORDER,
    decay_begins,
    learning_rate_factor,
    rows_of_step,
    steps_per_epoch,
)
from indraquantum.training.step import StepInput


@dataclass(frozen=True, eq=False)
class RunStage:
    """One stage with its data. Its signals are None until they are attached, or if it needs none."""

    number: int  # from 0
    spec: Stage  # the stage of the strategy, with all values resolved
    settings: TrainSettings | TeacherSettings  # those of the run, with the stage's own data, signals and learning rate
    dataset: PreparedDataset
    train: Split  # the rows it trains on: the dataset's training split, or the part of it from the stage's sources
    first: int  # its first step
    steps: int
    first_epoch: int  # how many epochs began before this stage
    signals: SignalStore | None = None
    order: int = ORDER  # the rule that orders its rows
    planned_steps: int | None = None  # its length when the run began, if that was another one; see resume.extended

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimiser step."""
        return rows_per_step(self.settings.batch_tokens, self.dataset.row_length)

    @property
    def micro_batch_rows(self) -> int:
        """Rows of one forward pass."""
        return rows_per_step(self.settings.micro_batch_tokens, self.dataset.row_length)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps in which each row is used once."""
        return steps_per_epoch(self.train.num_rows, self.rows_per_step)

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.first + self.steps

    @property
    def epochs(self) -> int:
        """Number of epochs that it begins, including one that it does not finish."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def __str__(self) -> str:
        """One line for a reader."""
        sources = "all sources" if self.spec.sources == "all" else ", ".join(self.spec.sources)
        weights = ", ".join(f"{term} {getattr(self.spec.weights, term)}" for term in TEACHER_TERMS)
        steps = f"steps {self.first + 1:,} to {self.end:,}, {self.steps / self.steps_per_epoch:.2f} epochs"
        return f"stage {self.spec.name}: {steps} of {self.train.num_rows:,} rows ({sources}); weights {weights}"

    @property
    def lacks_signals(self) -> bool:
        """Whether it needs the teacher's signals and has none yet."""
        return self.spec.asks_the_teacher and self.signals is None

    @property
    def has_truncated_signals(self) -> bool:
        """Whether its signals leave out part of the teacher's probability."""
        return self.signals is not None and self.signals.manifest.is_truncated

    def step(self, number: int) -> StepInput:
        """Return what step `number` of the run does."""
        settings, signals, weights = self.settings, self.signals, self.weights_of(number)
        return StepInput(
            split=self.train,
            rows=self.rows_of(number),
            micro_batch_rows=self.micro_batch_rows,
            learning_rate=self.learning_rate_of(number),
            table_rate=settings.table_rate,
            max_grad_norm=settings.max_grad_norm,
            signals=signals,
            kd_weight=weights["kd"],
            phase_weight=weights["phase"],
            magnitude_weight=weights["magnitude"],
            temperature=1.0 if signals is None else signals.manifest.temperature,
            tail=tail_of(settings) if self.has_truncated_signals else "none",
            seed=settings.seed * 1_000_003 + number,
        )

    def learning_rate_of(self, step: int) -> float:
        """Return the base learning rate at `step`."""
        settings = self.settings
        return settings.learning_rate * learning_rate_factor(
            step - self.first,
            self.steps,
            settings.warmup_fraction,
            settings.schedule,
            settings.decay_fraction,
            settings.final_rate,
            self.planned_steps,
        )

    def rows_of(self, step: int) -> np.ndarray:
        """Return the numbers of the rows of `step` in `train`."""
        seed, own_step = self.settings.seed, step - self.first
        return rows_of_step(self.train.num_rows, self.rows_per_step, seed, own_step, self.number, self.order)

    def weights_of(self, step: int) -> dict[str, float]:
        """Return the weights of the teacher's terms at `step`. They are 0 if there are no signals."""
        if self.signals is None:
            return dict.fromkeys(TEACHER_TERMS, 0.0)
        planned = self.planned_steps or self.steps
        place = min(step - self.first, planned - 1)
        return {term: getattr(self.spec.weights, term).at(place, planned) for term in TEACHER_TERMS}

    def rate_decays_from(self, step: int) -> bool:
        """Return whether wsd begins to decay after `step` steps of the run."""
        decays = self.spec.schedule == "wsd"
        return decays and step == self.first + decay_begins(self.steps, self.spec.decay_fraction)


@dataclass(frozen=True, eq=False)
class Plan:
    """All stages of a run."""

    strategy: Strategy
    dataset: PreparedDataset  # that of the run; its validation split is the held-out text
    stages: tuple[RunStage, ...]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.stages[-1].end

    @property
    def planned_steps(self) -> int:
        """Number of steps that the run had when it began."""
        return sum(stage.planned_steps or stage.steps for stage in self.stages)

    def __str__(self) -> str:
        return "\n".join(map(str, self.stages))

    def step(self, number: int) -> StepInput:
        """Return what the step after `number` finished steps does: rows, signals, loss weights, learning rate."""
        return self.at(number).step(number)

    def at(self, step: int) -> RunStage:
        """Return the stage that step `step` belongs to. After the end of the run, this is the last stage."""
        return self.stages[max(0, bisect_right([stage.first for stage in self.stages], step) - 1)]

    def before(self, step: int) -> RunStage:
        """Return the stage of the last finished step. At step 0, this is the first stage."""
        return self.at(max(0, step - 1))

    def ends_at(self, step: int) -> RunStage | None:
        """Return the stage that ends after `step` steps, or None."""
        stage = self.before(step)
        return stage if stage.end == step else None

    def epoch_ends(self, step: int) -> bool:
        """Return whether an epoch or a stage ends after `step` steps. At step 0 this is True."""
        stage = self.before(step)
        return (step - stage.first) % stage.steps_per_epoch == 0 or step == stage.end

    def epochs_done(self, step: int) -> float:
        """Return the number of passes over the rows of the stages after `step` steps, with decimals."""
        return sum(max(0, min(step, stage.end) - stage.first) / stage.steps_per_epoch for stage in self.stages)

    def epoch_of(self, step: int) -> int:
        """Return the number of the epoch that step `step` belongs to, from 1, over all stages."""
        stage = self.before(step)
        return stage.first_epoch + max(1, math.ceil((step - stage.first) / stage.steps_per_epoch))

    def step_of_epoch(self, epoch: int) -> int:
        """Return the step at which `epoch`, from 1, ends, or would end if it is after the last one."""
        for stage in self.stages:
            end = stage.first + (epoch - stage.first_epoch) * stage.steps_per_epoch
            if epoch <= stage.first_epoch + stage.epochs:
                return min(end, stage.end)
        return end


def tail_of(settings: TrainSettings) -> Tail:
    """Return what the objective does with the probability that truncated signals don't store."""
    return "bucket" if settings.tail == "auto" else settings.tail


def rows_per_step(batch_tokens: int, row_length: int) -> int:
    """Return the number of whole rows in `batch_tokens` positions, at least one."""
    return max(1, batch_tokens // row_length)


def plan_run(settings: TrainSettings, dataset: PreparedDataset) -> Plan:
    """Return the plan of a run: its strategy, applied to its data. This writes nothing and asks no teacher.

    Args:
        settings: the settings of the run.
        dataset: the open dataset of --data.

    Raises:
        UserError: the strategy is wrong, contradicts an option, or names a source that the data lack.
    """
    strategy = resolve(settings)
    stages: list[RunStage] = []
    ends = _ends_of_fractions(settings, strategy, dataset)
    for number, spec in enumerate(strategy.stages):
        changes = {name: getattr(spec, name) for name in RATES}
        if spec.data is not None:
            changes |= {"data": spec.data, "signals": spec.signals, "tokenizer": None}
        own = _other_dataset(spec, dataset) if spec.data is not None else dataset
        first = stages[-1].end if stages else 0
        stage = RunStage(
            number=number,
            spec=spec,
            settings=settings.model_copy(update=changes),
            dataset=own,
            train=_part_of_sources(spec, own),
            first=first,
            steps=0,
            first_epoch=stages[-1].first_epoch + stages[-1].epochs if stages else 0,
        )
        steps = ends[number] - first if ends else _own_steps(stage)
        if not steps:
            allowed = f"is too short for --strategy {settings.strategy}: it leaves stage {spec.name} without a step"
            raise UserError("--max-steps" if settings.max_steps else "--epochs", _asked(settings), allowed)
        stages.append(replace(stage, steps=steps))
    return Plan(strategy, dataset, tuple(stages))


def _asked(settings: TrainSettings) -> int:
    return settings.max_steps or settings.epochs


def _ends_of_fractions(settings: TrainSettings, strategy: Strategy, dataset: PreparedDataset) -> list[int]:
    """Return the step after each stage if stages are fractions of the run. Return nothing if they have own lengths."""
    fractions = [stage.fraction for stage in strategy.stages if stage.fraction is not None]
    rows = rows_per_step(settings.batch_tokens, dataset.row_length)
    steps = settings.epochs * steps_per_epoch(dataset.train.num_rows, rows)
    steps = min(steps, settings.max_steps or steps)
    return [round(steps * sum(fractions[: number + 1])) for number in range(len(fractions))]


def _own_steps(stage: RunStage) -> int:
    lengths = [] if stage.spec.steps is None else [stage.spec.steps]
    if stage.spec.epochs is not None:
        lengths.append(stage.spec.epochs * stage.steps_per_epoch)
    return min(lengths)


def _other_dataset(spec: Stage, dataset: PreparedDataset) -> PreparedDataset:
    field = f"--strategy: stage {spec.name}: data"
    other = open_dataset(field, spec.data, verify=True)
    require_same_tokenizer(field, spec.data, "must have the tokenizer of --data", dataset.tokenizer, other.tokenizer)
    require_same_control_tokens(field, spec.data, "those of --data", dataset.tokenizer, other.tokenizer)
    return other


def _part_of_sources(spec: Stage, dataset: PreparedDataset) -> Split:
    """Return the rows that the stage trains on.

    Raises:
        UserError: the dataset lacks a source, or has no training row of the sources.
    """
    names = dataset.source_names
    if spec.sources == "all":
        return dataset.train
    field = f"--strategy: stage {spec.name}: sources"
    for source in spec.sources:
        if source not in names:
            raise UserError(field, source, f"must be one of the dataset's: {', '.join(names)}")
    part = part_of_sources(dataset.train, [names.index(source) for source in spec.sources])
    if not part.num_rows:
        raise UserError(field, ", ".join(spec.sources), "must have a training row in the dataset")
    return part
