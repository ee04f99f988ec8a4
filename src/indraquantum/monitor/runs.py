"""Finding runs and what they have come to: every folder below a root that holds a metrics.jsonl is one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError
from indraquantum.files import is_locked
from indraquantum.metrics import RECORD_NAME, read_metrics


def find_run(*roots: str | Path) -> Path:
    """The metrics file to look at: $INDRA_METRICS where it is set, else the one written last below `roots`.

    Raises:
        UserError: there is none.
    """
    chosen = os.environ.get("INDRA_METRICS")
    if chosen:
        if not Path(chosen).is_file() or not Path(chosen).stat().st_size:
            raise UserError("INDRA_METRICS", chosen, "must be the metrics.jsonl of a run that has done a step")
        return Path(chosen)
    found = [path for root in roots for path in Path(root).rglob("metrics.jsonl") if path.stat().st_size]
    if not found:
        searched = ", ".join(map(str, roots))
        raise UserError("logs", searched, "holds no run with a step yet: train first, or set INDRA_METRICS")
    return max(found, key=lambda path: path.stat().st_mtime)


@dataclass(frozen=True)
class RunSummary:
    """What a run is and has come to."""

    name: str  # its folder, below the logs
    state: str  # finished, running, stopped, or unreadable
    steps: int  # done
    total_steps: int | None  # None where nothing tells
    tokens: int
    loss: float | None  # of the last step
    last_held_out: dict[str, float]  # cross-entropy per source at the last evaluation, nats per token
    best_held_out: dict[str, float]  # and at the one that was best for all text
    settings: dict[str, Any]  # and the hashes of data and signals; empty where no record is there


def summarise(metrics_path: Path, root: Path) -> RunSummary:
    """Read a run's metrics and its record, if there is one."""
    folder = metrics_path.parent
    name = str(folder.relative_to(root)) if folder != root else folder.name
    try:
        lines = read_metrics(metrics_path)
        record = _record(folder)
        evaluations = [line["held_out"] for line in lines if line["held_out"]]
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        steps, tokens = (lines[-1]["step"], lines[-1]["tokens"]) if lines else (0, 0)
    except (UserError, ValueError, KeyError, TypeError, OSError):
        return RunSummary(name, "unreadable", 0, None, 0, None, {}, {}, {})
    return RunSummary(
        name=name,
        state="finished" if record.get("finished") else "running" if is_locked(folder) else "stopped",
        steps=steps,
        total_steps=record.get("total_steps"),
        tokens=tokens,
        loss=losses[-1] if losses else None,
        last_held_out=evaluations[-1] if evaluations else {},
        best_held_out=min(evaluations, key=lambda figures: figures["all"]) if evaluations else {},
        settings=record["settings"] | {key: record[key] for key in ("data", "signals") if key in record},
    )


def _record(folder: Path) -> dict[str, Any]:
    """The run's record; empty where none was written.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD_NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": {}}
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{path} is no record of a run")
    return record


def all_runs(root: Path) -> list[RunSummary]:
    """The runs below `root`, by name.

    Raises:
        UserError: there is none.
    """
    found = sorted(root.rglob("metrics.jsonl"))
    if not found:
        raise UserError("--logs", root, "must hold runs: folders with a metrics.jsonl, as `indra train` writes them")
    return [summarise(path, root) for path in found]


def named_runs(root: Path, names: tuple[str, ...]) -> list[RunSummary]:
    """The runs called `names` below `root`, in that order; a name may be the path of a run's folder instead.

    Raises:
        UserError: one is not there.
    """
    runs = []
    for name in names:
        paths = [folder / "metrics.jsonl" for folder in (root / name, Path(name))]
        there = next((path for path in paths if path.is_file()), None)
        if there is None:
            known = ", ".join(sorted(str(path.parent.relative_to(root)) for path in root.rglob("metrics.jsonl")))
            raise UserError("RUNS", name, f"must be a run below {root} ({known or 'it holds none'}) or a run's folder")
        runs.append(summarise(there, root if there.is_relative_to(root) else there.parent.parent))
    return runs
