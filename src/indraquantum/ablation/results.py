"""The JSON file of a run. It is written once, when the run is done, and refused if the settings have changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum.ablation.plan import Plan, resolved
from indraquantum.errors import UserError
from indraquantum.evaluation.halves import Half
from indraquantum.files import read_json, without_nan, write_json
from indraquantum.training.earlier import with_defaults
from indraquantum.training.resume import first_difference
from indraquantum.training.run import FREE_SETTINGS

FORMAT = "indraquantum-ablation-run"
FORMAT_VERSION = 1
Result = dict[str, Any]
_NEEDED = {
    "variant", "half", "chosen", "settings", "readouts_measured_with", "status", "curve", "commit", "command",
    "versions",
}  # fmt: skip
_OF_STATUS = {  # what else is needed
    "finished": {
        "sources", "documents", "vocabulary_size", "alignment", "calibration", "readouts", "samples", "timing",
        "parameters", "table_parameters", "flops_per_token", "steps", "tokens",
    },
    "failed": {"line"},
}  # fmt: skip


def write_result(path: Path, record: Result) -> None:
    """Write the JSON file of a run, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, without_nan({"format": FORMAT, "format_version": FORMAT_VERSION, **record}))


def read_result(path: Path) -> Result | None:
    """Return the content of a run's JSON file, or None if the run is not done.

    Raises:
        UserError: `write_result` did not write this file.
    """
    if not path.exists():
        return None
    record = read_json("results", path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError("results", path, "must be the JSON file of a run; remove it, or give another --output")
    if record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version")
        raise UserError("results", path, f"has format version {found}; this program reads {FORMAT_VERSION}")
    _require(path, "it", record, _NEEDED)
    for name in ("settings", "chosen"):
        if not isinstance(record[name], dict):
            raise UserError("results", path, f"is damaged: its {name} must be a mapping")
    if record["status"] not in tuple(_OF_STATUS):
        raise UserError("results", path, "is damaged: its status must be finished or failed")
    _require(path, "it", record, _OF_STATUS[record["status"]])
    _require(path, "its settings", record["settings"], {"data", "signals"})
    return record


def _require(path: Path, what: str, part: Result, names: set[str]) -> None:
    if missing := sorted(names - part.keys()):
        raise UserError("results", path, f"is damaged: {what} must have {', '.join(missing)}")


def check_result(path: Path, record: Result, planned: Result) -> None:
    """Check that the run at `path` is the planned one. `planned` holds all that decides it, including its settings.

    An option that did not exist when the run was trained counts as what the program did then.

    Raises:
        UserError: the run is another one; the message names the first difference.
    """
    _compare(path, record, planned, record["settings"].keys() | planned["settings"].keys())


def check_checkpoint(folder: Path, settings: Result, planned: Result) -> None:
    """Check that a checkpoint in `folder` is of the planned run, before its figures get into the run's JSON file.

    A run that resumes keeps its values of some options that it is not given, so it may be another run than planned.

    Args:
        folder: the folder of the checkpoint.
        settings: those of the checkpoint.
        planned: as for `check_result`. A precision of auto is whatever the run began with.

    Raises:
        UserError: the checkpoint is of another run; the message names the first difference.
    """
    wanted = {name: value for name, value in planned["settings"].items() if name != "strategy"}
    if wanted["precision"] == "auto":
        del wanted["precision"]
    there = with_defaults(settings, wanted)
    found = first_difference(wanted, {name: there.get(name) for name in wanted})
    if found is not None:
        allowed = f"must hold a run with {'.'.join(found.path)} {found.now}, not {found.then}; remove it"
        raise UserError("--work", folder, allowed)


class Results(NamedTuple):
    """The results of a plan in a folder, by variant: runs by seed, and trials in the order of the grid."""

    runs: dict[str, dict[int, Result]]
    trials: dict[str, list[Result | None]]  # None: still to be done


def read_results(plan: Plan, folder: Path, shared: Result | None = None) -> Results:
    """Read the JSON files of the plan's runs and trials, and check them against the plan and against each other.

    What the data decide, such as the width that a budget chooses, is not checked against the plan here:
    `Bench.check_results` does that.

    Args:
        plan: the plan; the paths of its data and signals don't matter.
        folder: the folder of the JSON files.
        shared: what all of them must have: `data`, a content SHA-256, and `readouts_measured_with`. Without it, all
            must have what the first one has.

    Raises:
        UserError: a file belongs to other settings, data or signals; the message names it.
    """
    _require_readable(plan, folder)
    shared, runs, trials = dict(shared or {}), {}, {}
    for variant in plan.variants:
        grid = plan.grid_of(variant)
        paths = {seed: folder / f"{variant}-seed{seed}.json" for seed in plan.seeds}
        runs[variant] = {seed: record for seed, path in paths.items() if (record := read_result(path))}
        trials[variant] = [read_result(folder / "search" / f"{variant}-try{i}.json") for i in range(len(grid))]
        for seed, record in runs[variant].items():
            if record["chosen"] not in (grid or ({},)):
                raise _of_another(paths[seed], "a setting of the plan's search", record["chosen"])
            _check_stated(paths[seed], record, plan, variant, "table", seed)
            _check_shared(paths[seed], record, variant, shared)
        for i, record in enumerate(trials[variant]):
            if record is not None:
                path = folder / "search" / f"{variant}-try{i}.json"
                _compare(path, record, {"chosen": grid[i], "settings": {}}, ())
                _check_stated(path, record, plan, variant, "choice", plan.search.seed)
                _check_shared(path, record, variant, shared)
    return Results(runs, trials)


def _require_readable(plan: Plan, folder: Path) -> None:
    """Refuse files that can't be read, all of them at once.

    Raises:
        UserError: one or more of the plan's files are damaged; the message names each of them.
    """
    errors = []
    for variant in plan.variants:
        names = [f"{variant}-seed{seed}" for seed in plan.seeds]
        names += [f"search/{variant}-try{number}" for number in range(len(plan.grid_of(variant)))]
        for name in names:
            try:
                read_result(folder / f"{name}.json")
            except UserError as error:
                errors.append(error)
    if errors:
        first, *others = errors
        raise UserError(first.field, first.value, ". ".join([first.allowed, *map(str, others)]))


def _check_stated(path: Path, record: Result, plan: Plan, variant: str, half: Half, seed: int) -> None:
    """Check that the run at `path` has the options that the plan states, or their defaults."""
    settings = resolved(plan, variant, record["chosen"], data=plan.data, seed=seed)
    stated = settings.model_dump(mode="json", exclude=FREE_SETTINGS | {"start_from"}) | settings.decided()
    stated["strategy"] = Path(settings.strategy).name  # the plan may have been in another folder
    for name in ("tail", "softmax"):  # the run's signals and vocabulary decided
        if stated[name] == "auto":
            del stated[name]
    if variant in plan.budgets:  # the budget decided, for the data's vocabulary
        del stated["mlp_width"]
    if half == "choice":  # a part of a run's steps
        del stated["max_steps"]
    _compare(path, record, {"variant": variant, "half": half, "settings": stated}, stated)


def _check_shared(path: Path, record: Result, variant: str, shared: Result) -> None:
    """Check that the run at `path` has the same data as all others, and what the data decided for its variant.

    A setting of the search may decide some of this too, so trials need not agree in it.
    """
    settings = with_defaults(record["settings"], ["tail", "softmax"])
    has = {
        "data": settings["data"],
        "readouts_measured_with": record["readouts_measured_with"],
        f"signals of {variant}": settings["signals"],
    }
    if record["half"] == "table":
        decided = {"chosen": record["chosen"], **settings}
        names = ("chosen", "tail", "softmax", "mlp_width", "stages")
        has |= {f"{name} of {variant}": decided.get(name) for name in names}
    for name, value in has.items():
        if shared.setdefault(name, value) != value:
            raise _of_another(path, f"{name} {shared[name]}, as the others", value)


def _compare(path: Path, record: Result, planned: Result, options: Iterable[str]) -> None:
    names = (planned.keys() | set(options)) - {"settings"}
    then, now = (with_defaults({**part, **part["settings"]}, names) for part in (record, planned))
    for name in sorted(names):
        before, wanted = then.get(name), now.get(name)
        if before != wanted:
            raise _of_another(path, f"{name} {wanted}, as planned", before)


def _of_another(path: Path, wanted: str, found: Any) -> UserError:
    allowed = f"must belong to a run with {wanted}, not {found}; remove it, or give another --output"
    return UserError("results", path, allowed)
