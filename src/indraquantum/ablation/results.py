"""The JSON of a run: written once, when the run is done, and never again; one of other settings is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from indraquantum.ablation.plan import Plan, resolved
from indraquantum.errors import UserError
from indraquantum.files import read_json, without_nan, write_json
from indraquantum.training.resume import with_defaults
from indraquantum.training.run import FREE_SETTINGS

FORMAT = "indraquantum-ablation-run"
FORMAT_VERSION = 1
Record = dict[str, Any]
_NEEDED = {"variant", "half", "chosen", "settings", "status"}


def write_record(path: Path, record: Record) -> None:
    """Write the JSON of a run, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, without_nan({"format": FORMAT, "format_version": FORMAT_VERSION, **record}))


def read_record(path: Path) -> Record | None:
    """The JSON of a run, or None where the run is still to be done.

    Raises:
        UserError: the file is none that `write_record` wrote.
    """
    if not path.exists():
        return None
    record = read_json("results", path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not record.keys() >= _NEEDED:
        raise UserError("results", path, "must be the JSON of a run; remove it, or give another --output")
    if record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version")
        raise UserError("results", path, f"is of format version {found}; this program reads {FORMAT_VERSION}")
    for name in ("settings", "chosen"):
        if not isinstance(record[name], dict):
            raise UserError("results", path, f"is damaged: its {name} must be a mapping")
    if record["status"] not in ("finished", "failed"):
        raise UserError("results", path, "is damaged: its status must be finished or failed")
    return record


def check_record(path: Path, record: Record, planned: Record) -> None:
    """Check that the run at `path` is the planned one: `planned` holds what decides it, its settings among it.

    An option that the program did not have when the run was made counts as what the program did then.

    Raises:
        UserError: naming the first difference.
    """
    _compare(path, record, planned, record["settings"].keys() | planned["settings"].keys())


class Results(NamedTuple):
    """What a folder holds of a plan, by variant: runs by seed, and trials in the order of the grid."""

    runs: dict[str, dict[int, Record]]
    trials: dict[str, list[Record | None]]  # None: still to be done


def read_results(plan: Plan, folder: Path, shared: Record | None = None) -> Results:
    """Read the JSONs of the plan's runs and trials, checked as far as the plan tells, and against each other.

    Args:
        plan: the paths of its data and signals don't matter.
        folder: of the JSONs.
        shared: what all of them must have: `data`, content SHA-256, and `readouts_measured_with`; without it, what the
            first one has.

    Raises:
        UserError: naming one that is of other settings, data or signals.
    """
    shared, runs, trials = dict(shared or {}), {}, {}
    for variant in plan.variants:
        grid = plan.grid_of(variant)
        paths = {seed: folder / f"{variant}-seed{seed}.json" for seed in plan.seeds}
        runs[variant] = {seed: record for seed, path in paths.items() if (record := read_record(path))}
        trials[variant] = [read_record(folder / "search" / f"{variant}-try{i}.json") for i in range(len(grid))]
        for seed, record in runs[variant].items():
            if record["chosen"] not in (grid or ({},)):
                raise _of_another(paths[seed], "a setting of the plan's search", record["chosen"])
            _check_stated(paths[seed], record, plan, variant)
            _check_shared(paths[seed], record, variant, shared)
        for i, record in enumerate(trials[variant]):
            if record is not None:
                path = folder / "search" / f"{variant}-try{i}.json"
                _compare(path, record, {"variant": variant, "half": "choice", "chosen": grid[i], "settings": {}}, ())
                _check_shared(path, record, variant, shared)
    return Results(runs, trials)


def _check_stated(path: Path, record: Record, plan: Plan, variant: str) -> None:
    settings = resolved(plan, variant, record["chosen"], data=plan.data)
    stated = settings.model_dump(mode="json", exclude=FREE_SETTINGS | {"start_from", "seed"})
    stated["strategy"] = Path(settings.strategy).name  # a plan may lie in another folder
    if settings.tail == "auto":  # the run's signals decided
        del stated["tail"]
    _compare(path, record, {"variant": variant, "half": "table", "settings": stated}, stated)


def _check_shared(path: Path, record: Record, variant: str, shared: Record) -> None:
    """Check that the run at `path` has the data of the others, and the signals and tail of its variant's others."""
    has = {
        "data": record["settings"]["data"],
        "readouts_measured_with": record["readouts_measured_with"],
        f"signals of {variant}": record["settings"]["signals"],
        f"tail of {variant}": with_defaults(record["settings"], ["tail"])["tail"],
    }
    for name, value in has.items():
        if shared.setdefault(name, value) != value:
            raise _of_another(path, f"{name} {shared[name]}, as the others", value)


def _compare(path: Path, record: Record, planned: Record, options: Iterable[str]) -> None:
    names = (planned.keys() | set(options)) - {"settings"}
    then, now = (with_defaults({**part, **part["settings"]}, names) for part in (record, planned))
    for name in sorted(names):
        before, wanted = then.get(name), now.get(name)
        if before != wanted:
            raise _of_another(path, f"{name} {wanted}, as planned", before)


def _of_another(path: Path, wanted: str, found: Any) -> UserError:
    allowed = f"must be of a run with {wanted}, not {found}; remove it, or give another --output"
    return UserError("results", path, allowed)
