"""Strategies are data: a YAML file of stages, each with its sources, loss weights, learning rate and length.

    indra train --strategy stage2-v3-gentle
    indra train --strategy my.yaml

The shipped ones are strategies/*.yaml beside this file; docs/FORMATS.md describes every field. A part of a run is a
stage here, as `phase` is the angle of the model's state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from indraquantum.config import OptimizerSettings, Settings, TrainSettings
from indraquantum.errors import UserError, as_option
from indraquantum.yaml_settings import checked, read_yaml, with_numbers

SHIPPED = Path(__file__).parent / "strategies"
# The optimiser's options that a stage may set. If it does not, the option of the same name is used.
RATES = ("learning_rate", "table_rate", "schedule", "warmup_fraction", "decay_fraction", "final_rate")
# The options that replace a term's curve.
WEIGHT_OPTIONS = {
    "kd": {"start": "kd_weight_start", "end": "kd_weight_end"},
    "phase": {"value": "phase_weight"},
    "magnitude": {"value": "magnitude_weight"},
}
TEACHER_TERMS = tuple(WEIGHT_OPTIONS)
TEXTS = frozenset({"about", "start_from", "name", "data", "signals", "sources"})  # of a file
Weight = Annotated[float, Field(ge=0, le=100, strict=True)]
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]


class Constant(Settings):
    """A weight that never changes; a plain number means the same."""

    shape: Literal["constant"] = "constant"
    value: Weight

    def __str__(self) -> str:
        return f"{self.value:g}"

    def at(self, step: int, steps: int) -> float:
        """The weight at `step` of `steps`."""
        return self.value

    @property
    def highest(self) -> float:
        """Its largest value."""
        return self.value


class Ramp(Settings):
    """A weight that changes from `start` at a stage's first step to `end` at its last."""

    start: Weight
    end: Weight

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g}"

    @property
    def highest(self) -> float:
        """Its largest value."""
        return max(self.start, self.end)


class Linear(Ramp):
    """A weight that changes in a straight line."""

    shape: Literal["linear"] = "linear"

    def at(self, step: int, steps: int) -> float:
        """The weight at `step` of `steps`."""
        return self.start + (self.end - self.start) * step / max(1, steps - 1)


class Cosine(Ramp):
    """A weight that changes along half a cosine, which is flat at both ends."""

    shape: Literal["cosine"] = "cosine"

    def at(self, step: int, steps: int) -> float:
        """The weight at `step` of `steps`."""
        return self.start + (self.end - self.start) * 0.5 * (1 - math.cos(math.pi * step / max(1, steps - 1)))


class Steps(Settings):
    """A weight that jumps: it starts with the first of `values`, and takes the next one at each of `at_progress`."""

    shape: Literal["step"] = "step"
    values: Annotated[tuple[Weight, ...], Field(min_length=2)]
    at_progress: tuple[Fraction, ...]

    def __str__(self) -> str:
        return ", then ".join(f"{value:g}" for value in self.values)

    def at(self, step: int, steps: int) -> float:
        """The weight at `step` of `steps`."""
        return self.values[bisect_right(self.at_progress, step / max(1, steps - 1))]

    @property
    def highest(self) -> float:
        """Its largest value."""
        return max(self.values)


def _curve(value: Any) -> Any:
    if isinstance(value, int | float):
        return {"shape": "constant", "value": value}
    if not isinstance(value, Settings | dict) or (isinstance(value, dict) and "shape" not in value):
        raise ValueError("must be a number, or a curve: its shape (constant, linear, cosine or step) and its values")
    return value


def _sources(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        raise ValueError(f"must be all, or a list of sources: [{value}]")
    return value


Curve = Annotated[
    Annotated[Constant | Linear | Cosine | Steps, Field(discriminator="shape")], BeforeValidator(_curve)
]  # fmt: skip


class Weights(Settings):
    """Weights of the teacher's terms. The weight of cross-entropy is always 1."""

    kd: Curve = Constant(value=0.0)
    """Weight of the distillation term."""
    phase: Curve = Constant(value=0.0)
    """Weight of the phase term, which ties the phase to the teacher's entropy."""
    magnitude: Curve = Constant(value=0.0)
    """Weight of the magnitude term, which ties the magnitude to the teacher's confidence."""


class Stage(Settings):
    """A part of a run. Its length is a fraction of the run, or a number of epochs or steps, whichever ends first."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    """The stage's name in the metrics."""
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    """The stage's fraction of the run's steps, which --epochs and --max-steps give."""
    epochs: int | None = Field(default=None, ge=1, le=100_000, strict=True)
    """Passes over the stage's rows."""
    steps: int | None = Field(default=None, ge=1, strict=True)
    """Optimiser steps."""
    sources: Annotated[Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(_sources)] = (
        "all"
    )
    """The sources of the dataset to train on."""
    data: Path | None = None
    """Another dataset than --data, with the same tokenizer. The path is relative to the file."""
    signals: Path | None = None
    """The teacher's signals for `data`. By default they are in the folder teacher_signals beside it."""
    weights: Weights = Weights()
    """The weights of the loss terms."""
    temperature: float | None = Field(default=None, ge=0.01, le=100, strict=True)
    """The temperature at which the signals must have been captured. By default any is accepted."""
    learning_rate: float | None = Field(default=None, gt=0, le=10, strict=True)
    """The peak learning rate. By default this and the five below are the options of the same names."""
    table_rate: float | None = Field(default=None, gt=0, le=1000, strict=True)
    """The embedding table's learning rate, as a multiple of learning_rate."""
    schedule: Literal["cosine", "wsd", "constant"] | None = None
    """The learning-rate schedule of the stage."""
    warmup_fraction: float | None = Field(default=None, ge=0, lt=1, strict=True)
    """Fraction of the stage over which the learning rate rises from 0."""
    decay_fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    """Fraction of the stage over which wsd decays."""
    final_rate: float | None = Field(default=None, ge=0, le=1, strict=True)
    """The learning rate at the end, as a fraction of the peak."""
    only_from_scratch: bool = Field(default=False, strict=True)
    """Skip this stage in a run that starts from a checkpoint."""

    @property
    def asks_the_teacher(self) -> bool:
        """Whether a weight is ever positive."""
        return any(getattr(self.weights, term).highest > 0 for term in TEACHER_TERMS)


class Strategy(Settings):
    """All stages of a run."""

    about: str = ""
    """A sentence about the strategy."""
    start_from: Path | None = None
    """A checkpoint whose weights the run starts from. The path is relative to the file."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """The stages, which are trained one after the other."""

    @property
    def asks_the_teacher(self) -> bool:
        """Whether any stage needs signals."""
        return any(stage.asks_the_teacher for stage in self.stages)


def shipped_names() -> list[str]:
    """Return the names of the strategies that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_strategy(name: str) -> Strategy:
    """Read and check a strategy: a shipped one by its name, or a YAML file.

    Raises:
        UserError: the strategy is wrong; the message names the field, its value and what is allowed.
    """
    path = SHIPPED / f"{name}.yaml" if name in shipped_names() else Path(name)
    if not path.is_file():
        raise UserError("--strategy", name, f"must be {', '.join(shipped_names())}, or a YAML file")
    where = f"--strategy {name}: "
    content = with_numbers(read_yaml("--strategy", path, "stages"), TEXTS)
    strategy = checked(lambda: Strategy.model_validate(content), where)
    _check(where, strategy)

    def beside(place: Path | None) -> Path | None:
        return None if place is None else path.parent / place

    stages = tuple(
        stage.model_copy(update={"data": beside(stage.data), "signals": beside(stage.signals)})
        for stage in strategy.stages
    )
    return strategy.model_copy(update={"stages": stages, "start_from": beside(strategy.start_from)})


def _check(where: str, strategy: Strategy) -> None:
    """Check what no single field shows: names, lengths and curves that contradict each other."""
    names = [stage.name for stage in strategy.stages]
    for number, stage in enumerate(strategy.stages):
        place = f"{where}stages.{number}"
        if names.index(stage.name) != number:
            raise UserError(f"{place}.name", stage.name, "must differ from the stages before it")
        if stage.fraction is None and stage.epochs is None and stage.steps is None:
            raise UserError(f"{place}.fraction", "nothing", "must be given, or epochs, or steps")
        for own in ("epochs", "steps"):
            if getattr(stage, own) is not None and any(other.fraction for other in strategy.stages):
                raise UserError(
                    f"{place}.{own}", getattr(stage, own), "must be left out, because a stage has a fraction"
                )
        if stage.signals is not None and stage.data is None:
            raise UserError(
                f"{place}.signals", stage.signals, "must be left out without data of the stage's own; use --signals"
            )
        if stage.sources != "all" and len(set(stage.sources)) < len(stage.sources):
            raise UserError(f"{place}.sources", ", ".join(stage.sources), "must all be different")
        for term, curve in _steps_of(stage):
            field = f"{place}.weights.{term}.at_progress"
            if len(curve.at_progress) != len(curve.values) - 1:
                raise UserError(
                    field,
                    _list(curve.at_progress),
                    f"must have one number fewer than values, which has {len(curve.values)}",
                )
            if any(second <= first for first, second in pairwise(curve.at_progress)):
                raise UserError(field, _list(curve.at_progress), "must rise")
    fractions = [stage.fraction for stage in strategy.stages if stage.fraction is not None]
    if fractions and abs(sum(fractions) - 1) > 1e-9:
        raise UserError(f"{where}stages.fraction", _list(fractions), "must sum to 1")


def _steps_of(stage: Stage) -> Iterator[tuple[str, Steps]]:
    for term in TEACHER_TERMS:
        if isinstance(curve := getattr(stage.weights, term), Steps):
            yield term, curve


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def resolve(settings: TrainSettings) -> Strategy:
    """Return the strategy of `settings` with all its values. The options that were given replace its own values.

    Raises:
        UserError: the strategy is wrong, or an option contradicts it.
    """
    strategy = load_strategy(settings.strategy)
    if settings.start_from is not None:
        strategy = strategy.model_copy(update={"start_from": settings.start_from})
    if strategy.start_from is not None:
        left = tuple(stage for stage in strategy.stages if not stage.only_from_scratch)
        if not left:
            raise UserError(
                "--start-from",
                strategy.start_from,
                f"must be left out with --strategy {settings.strategy}, which would have no stage left",
            )
        strategy = strategy.model_copy(update={"stages": left})
    _check_lengths(settings, strategy)
    stages = _with_rates(settings, strategy.stages)
    return strategy.model_copy(update={"stages": _with_weights(settings, stages)})


def _check_lengths(settings: TrainSettings, strategy: Strategy) -> None:
    if strategy.stages[0].fraction is None:
        for option in ("epochs", "max_steps"):
            if option in settings.model_fields_set and getattr(settings, option) is not None:
                allowed = f"must be left out with --strategy {settings.strategy}, whose stages set their own lengths"
                raise UserError(as_option(option), getattr(settings, option), allowed)


def _with_rates(settings: TrainSettings, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    for name in RATES:
        if name in settings.model_fields_set:
            _require_alike(settings, name, [getattr(stage, name) for stage in stages])
            stages = tuple(stage.model_copy(update={name: getattr(settings, name)}) for stage in stages)
        own = getattr(settings, name)
        stages = tuple(s if getattr(s, name) is not None else s.model_copy(update={name: own}) for s in stages)
    for stage in stages:
        check_decay(stage, f" of stage {stage.name}")
    return stages


def check_decay(rates: Stage | OptimizerSettings, of: str = "") -> None:
    """Check that wsd has room to decay after its warm-up; `of` ends the message.

    Raises:
        UserError: the two fractions sum to more than 1.
    """
    if rates.schedule == "wsd" and rates.warmup_fraction + rates.decay_fraction > 1:
        allowed = f"must be at most 1 with the warm-up fraction {rates.warmup_fraction}{of}"
        raise UserError("--decay-fraction", rates.decay_fraction, allowed)


def _with_weights(settings: TrainSettings, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    for term, options in WEIGHT_OPTIONS.items():
        given = {part: option for part, option in options.items() if option in settings.model_fields_set}
        for part, option in given.items():
            value = getattr(settings, option)
            curves = [getattr(stage.weights, term) for stage in stages]
            _require_alike(settings, option, curves)
            if settings.no_teacher and value:
                raise UserError(as_option(option), value, "must be left out with --no-teacher")
            if part != "value" and not isinstance(curves[0], Constant | Linear):
                allowed = f"must be left out with --strategy {settings.strategy}, whose curve is not a straight line"
                raise UserError(as_option(option), value, allowed)
        parts = {part: getattr(settings, option) for part, option in given.items()}
        stages = tuple(_with_curve(stage, term, parts) for stage in stages)
    if settings.no_teacher:
        stages = tuple(stage.model_copy(update={"weights": Weights(), "temperature": None}) for stage in stages)
    return stages


def _with_curve(stage: Stage, term: str, parts: dict[str, float]) -> Stage:
    if not parts:
        return stage
    curve = getattr(stage.weights, term)
    if "value" in parts:
        changed: Settings = Constant(**parts)
    else:
        ends = {"start": curve.value, "end": curve.value} if isinstance(curve, Constant) else vars(curve)
        changed = Linear(**(ends | parts))
    return stage.model_copy(update={"weights": stage.weights.model_copy(update={term: changed})})


def _require_alike(settings: TrainSettings, option: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        allowed = f"must be left out with --strategy {settings.strategy}, whose stages differ in it"
        raise UserError(as_option(option), getattr(settings, option), f"{allowed}; set it in your own YAML file")
