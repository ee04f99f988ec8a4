"""The plan of an ablation, a YAML file: the variants, the options they share, and the seeds.

An example is configs/ablations/replica.yaml. Paths are relative to the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from indraquantum.config import Settings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.strategy import shipped_names
from indraquantum.training.run import FREE_SETTINGS
from indraquantum.yaml_settings import checked, read_yaml

# The options that a plan may set: all that decide a run, except its seed and data, and what counts as a failure. It
# may not set patience, which would stop a run by the held-out text that the table comes from.
ALLOWED = (set(TrainSettings.model_fields) - FREE_SETTINGS - {"seed", "patience"}) | {"on_collapse"}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=60)]
Overrides = dict[str, bool | int | float | str | None]
Grid = Annotated[tuple[Overrides, ...], Field(max_length=6)]


class Search(Settings):
    """A small search before the runs. Each variant is trained with the setting that is best on the choice half."""

    grid: Grid = ()
    """The settings to try for every variant; each is a set of options."""
    variants: dict[Name, Grid] = {}
    """Other grids for some variants. An empty grid searches nothing."""
    fraction: float = Field(default=1 / 3, gt=0, le=1)
    """The fraction of a run's steps that each trial takes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the trials."""


class Budget(Settings):
    """What a variant may cost. The width of its MLP is chosen so that it comes as near as possible."""

    parameters: int | None = Field(default=None, ge=1)
    """Parameters of the whole model."""
    mflop_per_token: float | None = Field(default=None, gt=0)
    """Work for each trained token, forward and backward, in MFLOP, as if all tokens of the vocabulary were compared."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.parameters is None) == (self.mflop_per_token is None):
            raise ValueError("must have either parameters or mflop_per_token")
        return self


class Plan(Settings):
    """What an ablation compares."""

    name: Name
    """The name of the plan, which is also that of its folders."""
    about: str = ""
    """A sentence for the top of the report."""
    data: Path
    """The prepared dataset, relative to the plan."""
    signals: Path | None = None
    """The teacher's signals, relative to the plan. They are used for training, and compared with the readouts."""
    base: Overrides = {}
    """Options of `indra train` that all variants share."""
    variants: Annotated[dict[Name, Overrides], Field(min_length=1)]
    """Options of each variant, which replace those of the base; `signals` too. Paths are relative to the plan."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = (0,)
    """The seeds. Each variant is trained once with each seed."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of variants whose difference at equal seeds is reported: the first minus the second."""
    equal_rows: bool = True
    """Whether all variants must train on equally many rows. A plan at equal time turns it off."""
    equal_parameters: tuple[tuple[str, ...], ...] = ()
    """Groups of variants whose numbers of parameters must agree within 1 %."""
    equal_work: tuple[tuple[str, ...], ...] = ()
    """Groups of variants whose FLOPs a token must agree within 1 %."""
    budgets: dict[Name, Budget] = {}
    """What some variants may cost, instead of a `mlp_width` of theirs."""
    families: dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    """Variants that differ in size alone. The report draws each family's loss over parameters and over work, and
    compares the families with the first one."""
    search: Search | None = None
    """The search for each variant's best setting. Its paths are relative to the plan too."""
    _folder: Path = Path()  # of the plan, for the search; results record its paths as they are in the plan

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must all be different")
        return seeds

    def grid_of(self, variant: str) -> tuple[Overrides, ...]:
        """Return the settings to try for `variant`; none without a search."""
        return () if self.search is None else self.search.variants.get(variant, self.search.grid)


def load_plan(path: Path) -> Plan:
    """Read and check a plan, whose paths become relative to the current folder, except those of the search.

    Raises:
        UserError: the plan is wrong; the message names the field, its value and what is allowed.
    """
    content = read_yaml("CONFIG", path, "name, data and variants")
    plan = checked(lambda: Plan.model_validate(content), f"{path}: ")
    plan._folder = path.parent
    _check_names(path, plan)
    _check_overrides(path, plan)
    return plan.model_copy(
        update={
            "data": path.parent / plan.data,
            "signals": plan.signals and path.parent / plan.signals,
            "base": _beside(path.parent, plan.base),
            "variants": {name: _beside(path.parent, overrides) for name, overrides in plan.variants.items()},
        }
    )


def resolved(plan: Plan, variant: str, chosen: Overrides, **common: Any) -> TrainSettings:
    """Return the training settings of a run: the common ones, replaced by base, variant and chosen setting in turn.

    Raises:
        UserError: a value is out of range.
    """
    stated = plan.base | plan.variants[variant] | _beside(plan._folder, chosen)
    return checked(lambda: TrainSettings(**(common | stated)), f"variants.{variant}: ")


def _beside(folder: Path, overrides: Overrides) -> Overrides:
    """Return `overrides` with paths that are relative to the current folder instead of the plan."""
    paths = {name: overrides.get(name) for name in ("signals", "strategy", "start_from")}
    stated = {name: str(path) for name, path in paths.items() if path is not None and path not in shipped_names()}
    return overrides | {name: str(folder / path) for name, path in stated.items()}


def _check_names(path: Path, plan: Plan) -> None:
    groups = {
        "pairs": plan.pairs,
        "equal_parameters": plan.equal_parameters,
        "equal_work": plan.equal_work,
        "budgets": (tuple(plan.budgets),),
        "families": tuple(plan.families.values()),
    }
    if plan.search is not None:
        groups["search.variants"] = (tuple(plan.search.variants),)
    for field, names in groups.items():
        for name in (name for group in names for name in group):
            if name not in plan.variants:
                raise UserError(f"{path}: {field}", name, f"must be one of the variants {', '.join(plan.variants)}")


def _check_overrides(path: Path, plan: Plan) -> None:
    """Check that all options may be set and are in range, and that no search changes what a variant sets."""
    for place, overrides in {"base": plan.base, **{f"variants.{n}": o for n, o in plan.variants.items()}}.items():
        _check_fields(f"{path}: {place}", overrides, ALLOWED | {"signals"})
    for variant, stated in plan.variants.items():
        resolved(plan, variant, {}, data=plan.data)
        _check_width(f"{path}: variants.{variant}", plan, variant, stated)
        for trial in plan.grid_of(variant):
            _check_fields(f"{path}: search.grid", trial, ALLOWED)
            resolved(plan, variant, trial, data=plan.data)
            _check_width(f"{path}: search.grid", plan, variant, trial)
            if both := sorted(trial.keys() & stated.keys()):
                raise UserError(
                    f"{path}: search.grid.{both[0]}",
                    trial[both[0]],
                    f"must be left out, because variants.{variant} sets it",
                )


def _check_width(where: str, plan: Plan, variant: str, overrides: Overrides) -> None:
    if variant in plan.budgets and "mlp_width" in overrides:
        allowed = f"must be left out, because the budget of {variant} chooses it"
        raise UserError(f"{where}.mlp_width", overrides["mlp_width"], allowed)


def _check_fields(where: str, overrides: Overrides, allowed: set[str]) -> None:
    for field, value in overrides.items():
        if field not in allowed:
            raise UserError(f"{where}.{field}", value, f"must be an option of a run: {', '.join(sorted(allowed))}")
