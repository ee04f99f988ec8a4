"""The JSON of a run: written once, when the run is done, and never again; one of other settings is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from indraquantum.ablation.plan import Plan, resolved
from indraquantum.errors import UserError
from indraquantum.files import read_json, without_nan, write_json
from indraquantum.training.run import FREE_SETTINGS, with_defaults

FORMAT = "indraquantum-ablation-run"
FORMAT_VERSION = 1
Record = dict[str, Any]


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
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError("results", path, "must be the JSON of a run; remove it, or give another --output")
    if record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version")
        raise UserError("results", path, f"is of format version {found}; this program reads {FORMAT_VERSION}")
    return record


def check_record(path: Path, record: Record, planned: Record) -> None:
    """Check that the run at `path` is the planned one: `planned` holds what decides it, its settings among it.

    An option that the program did not have when the run was made stands at its default.

    Raises:
        UserError: naming the first difference.
    """
    _compare(path, record, planned, record["settings"].keys() | planned["settings"].keys())


def check_stated(path: Path, record: Record, plan: Plan, variant: str) -> None:
    """Check that the run at `path` is one of `variant`, as far as the plan alone tells; data may be elsewhere.

    Raises:
        UserError: naming the first difference.
    """
    grid = plan.grid_of(variant) or ({},)
    if record["chosen"] not in grid:
        where = f"a setting of the plan's search, not {record['chosen']}"
        raise UserError("results", path, f"must be of a run with {where}; remove it, or give another --output")
    settings = resolved(plan, variant, record["chosen"], data=plan.data)
    stated = settings.model_dump(mode="json", exclude=FREE_SETTINGS | {"strategy", "start_from", "seed"})
    _compare(path, record, {"variant": variant, "settings": stated}, stated)


def _compare(path: Path, record: Record, planned: Record, options: Iterable[str]) -> None:
    names = (planned.keys() | set(options)) - {"settings"}
    then, now = (with_defaults({**part, **part["settings"]}, names) for part in (record, planned))
    for name in sorted(names):
        before, wanted = then.get(name), now.get(name)
        if before != wanted:
            where = f"{name} {wanted}, as planned, not {before}"
            raise UserError("results", path, f"must be of a run with {where}; remove it, or give another --output")
