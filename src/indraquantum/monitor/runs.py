"""Finds runs and reads their state and figures. Every folder with a metrics.jsonl is a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError
from indraquantum.files import HELD, is_locked
from indraquantum.metrics import METRICS_NAME, Line, checked_lines, read_record
from indraquantum.monitor.tail import Tail


def find_runs(*roots: str | Path) -> list[Path]:
    """Return the metrics files to show: those in $INDRA_METRICS, which `:` separates, else the newest below `roots`.

    Raises:
        UserError: there is no metrics file.
    """
    chosen = [Path(name) for name in os.environ.get("INDRA_METRICS", "").split(os.pathsep) if name]
    for path in chosen:
        if not path.is_file() or not path.stat().st_size:
            raise UserError("INDRA_METRICS", path, "must be the metrics.jsonl of a run with at least one step")
    if chosen:
        return chosen
    found = [path for root in roots for path in metrics_files(Path(root)) if path.stat().st_size]
    if not found:
        searched = ", ".join(map(str, roots))
        raise UserError("logs", searched, "holds no run with a step; train first, or set INDRA_METRICS")
    return [max(found, key=lambda path: path.stat().st_mtime)]


def metrics_files(root: Path) -> list[Path]:
    """Return the metrics files below `root`, sorted. A folder in it that can't be read, or is gone, is left out.

    Raises:
        OSError: `root` itself is there but can't be read.
    """

    def skip(error: OSError) -> None:
        if error.filename == str(root) and root.is_dir():
            raise error

    found = (Path(folder, METRICS_NAME) for folder, _, names in os.walk(root, onerror=skip) if METRICS_NAME in names)
    return sorted(path for path in found if os.path.isfile(path))  # unlike Path.is_file, False if the system refuses


def name_of(metrics_path: Path, root: Path) -> str:
    """Return the name of the run with these metrics: its folder below `root`."""
    folder = metrics_path.parent
    return str(folder.relative_to(root)) if folder != root else folder.resolve().name


NO_EVALUATION = b'"held_out": null'  # in most lines; `Line.lacks` asks the same, more slowly


@dataclass(frozen=True)
class RunSummary:
    """The settings, state and figures of a run."""

    name: str  # its folder, below the logs
    state: str  # see `state_of`; or damaged, with the reason
    steps: int = 0  # done
    total_steps: int | None = None  # None if it is not known
    tokens: int = 0
    loss: float | None = None  # of the last step
    last_held_out: dict[str, float] = field(default_factory=dict)  # cross-entropy per source, nats per token
    best_held_out: dict[str, float] = field(default_factory=dict)  # at the evaluation that was best for all text
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # with the hashes of data and signals; empty without a run.json


def summarise(metrics_path: Path, root: Path) -> RunSummary:
    """Read a run's metrics, and its run.json if there is one. If a file is damaged, the state says so."""
    folder, name = metrics_path.parent, name_of(metrics_path, root)
    try:
        record, figures = read_record(folder) or {}, _figures(metrics_path)
    except UserError as error:
        reason = error.allowed.removeprefix("is damaged: ")
        return RunSummary(name, f"damaged: {Path(error.value).name}: {reason}")
    state = state_of(folder, record, lambda: Tail(metrics_path, metrics_path.stat().st_size).collapse)
    settings = record.get("settings", {}) | {key: record[key] for key in ("data", "signals") if key in record}
    return RunSummary(name, state, total_steps=record.get("total_steps"), settings=settings, **figures)


def state_of(folder: Path, record: dict[str, Any], collapse: Callable[[], list[str]]) -> str:
    """Return the state of the run that logs to `folder`.

    Args:
        folder: the folder of its metrics.
        record: its run.json; empty without one.
        collapse: returns the kinds of collapse that the last look suspected.

    Returns:
        finished; running; collapsed if it ended with a suspected collapse; died if its process was killed; or stopped.
    """
    if record.get("finished"):
        return "finished"
    if is_locked(folder):
        return "running"
    if collapse():
        return "collapsed"
    return "died" if (folder / HELD).exists() else "stopped"  # a run that ends by itself removes that file


def _figures(path: Path) -> dict[str, Any]:
    """Return the fields of `RunSummary` that are in the metrics. Only the lines that hold them are parsed.

    Raises:
        UserError: a line is damaged.
    """
    last, best, held_out = None, {}, {}
    try:
        for last in checked_lines(path):
            if NO_EVALUATION not in last.content and (found := _held_out(last)):
                held_out = found
                best = min(best or found, found, key=lambda figures: figures["all"])
    except OSError as error:
        raise UserError("--logs", path, f"can't be read: {error.strerror}") from None
    if last is None:
        return {}
    return {
        "steps": _figure(last, "step", int) or 0,
        "tokens": _figure(last, "tokens", int) or 0,
        "loss": _figure(last, "loss", int | float),
        "last_held_out": held_out,
        "best_held_out": best,
    }


def evaluation_until(path: Path, step: int) -> tuple[int, dict[str, float]]:
    """Return the step and the figures of the last evaluation in the metrics at `path` that is not after `step`.

    Without one, the figures are empty.

    Raises:
        UserError: a line is damaged.
        OSError: the file can't be read.
    """
    last: tuple[int, dict[str, float]] = (0, {})
    for line in checked_lines(path):
        if NO_EVALUATION not in line.content and (found := _held_out(line)):
            measured = _figure(line, "step", int) or 0
            if last[0] <= measured <= step:
                last = measured, found
    return last


def _figure(line: Line, name: str, kind: Any) -> Any:
    value = line.parse().get(name)
    if value is not None and not _is_figure(value, kind):
        raise line.damaged(f"has no valid figure for {name}")
    return value


def _held_out(line: Line) -> dict[str, float]:
    figures = line.parse().get("held_out") or {}
    named = isinstance(figures, dict) and all(_is_figure(figures.get(name), int | float) for name in ("all", *figures))
    if figures and not named:
        raise line.damaged("has no valid figures for held_out")
    return figures


def _is_figure(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, float) or abs(value) < 2**63)


def all_runs(root: Path) -> list[RunSummary]:
    """Return the runs below `root`, sorted by name.

    Raises:
        UserError: there is no run.
    """
    found = metrics_files(root)
    if not found:
        raise UserError("--logs", root, "must hold runs: folders with a metrics.jsonl, as `indra train` writes them")
    return [summarise(path, root) for path in found]


def named_runs(root: Path, names: tuple[str, ...]) -> list[RunSummary]:
    """Return the runs called `names` below `root`, in that order. A name may also be the path of a run's folder.

    Raises:
        UserError: one of them does not exist.
    """
    runs = []
    for name in names:
        paths = [folder / METRICS_NAME for folder in (root / name, Path(name))]
        there = next((path for path in paths if path.is_file()), None)
        if there is None:
            known = ", ".join(str(path.parent.relative_to(root)) for path in metrics_files(root))
            raise UserError(
                "RUNS", name, f"must be a run below {root} ({known or 'it holds none'}) or the folder of a run"
            )
        runs.append(summarise(there, root if there.is_relative_to(root) else there.parent.parent))
    return runs
