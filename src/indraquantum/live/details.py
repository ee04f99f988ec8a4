"""What a page shows of one run besides its curves: settings, checkpoints and samples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError, as_option
from indraquantum.metrics import read_record
from indraquantum.monitor.run_table import differences
from indraquantum.monitor.runs import RunSummary, name_of

MOST_CHECKPOINTS = 200
MOST_SAMPLES = 60
SAMPLE_BYTES = 1 << 18


def details_of(metrics_path: Path) -> dict[str, Any]:
    """Return settings and checkpoints of the run with these metrics."""
    record = _record(metrics_path.parent)
    settings = record.get("settings") or {}
    shown = {as_option(name): _word(value) for name, value in settings.items()}
    return {
        "settings": shown | {name: _word(record[name]) for name in ("data", "signals") if record.get(name)},
        "folder": str(checkpoint_folder(record) or ""),
        "samples": _samples(metrics_path.with_name("samples.jsonl")),
        "checkpoints": [found for path in checkpoints_of(record) if (found := _checkpoint(path))],
    }


def checkpoint_folder(record: dict[str, Any]) -> Path | None:
    """Return the folder of a run's checkpoints, as its run.json names it."""
    settings = record.get("settings")
    named = record.get("checkpoints") or (settings.get("output") if isinstance(settings, dict) else None)
    return Path(named) if isinstance(named, str) and "\0" not in named else None


def checkpoints_of(record: dict[str, Any]) -> list[Path]:
    """Return the checkpoints in that folder, the last one written first."""
    folder = checkpoint_folder(record)
    try:
        paths = [] if folder is None else list(folder.glob("checkpoint_v4_*.pt"))
    except OSError:
        return []
    found = [(about.st_mtime_ns, path) for path in paths if (about := _about(path))]
    return [path for _, path in sorted(found, reverse=True)[:MOST_CHECKPOINTS]]


def _about(path: Path) -> os.stat_result | None:
    """Return what the system says about a file; None if training has removed it meanwhile."""
    try:
        return path.stat()
    except OSError:
        return None


def _checkpoint(path: Path) -> dict[str, Any] | None:
    about = _about(path)
    if about is None:
        return None
    try:
        step = json.loads(path.with_suffix(".json").read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        step = None  # without a manifest, only the name tells
    step = step if type(step) is int else None
    return {"name": path.name, "bytes": about.st_size, "written": about.st_mtime, "step": step}


def _samples(path: Path) -> list[dict[str, Any]]:
    """Return the last samples that training wrote, the newest first, without damaged lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
            lines = file.read(SAMPLE_BYTES).split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in reversed(lines[-MOST_SAMPLES:]):
        try:
            sample = json.loads(line)
            fits = isinstance(sample, dict) and type(sample["step"]) is int
            fits = fits and all(isinstance(sample[name], str) for name in ("prompt", "text"))
        except (ValueError, KeyError, RecursionError):
            continue
        if fits:
            found.append({name: sample[name] for name in ("step", "prompt", "text")})
    return found


def differences_of(paths: list[Path], root: Path) -> dict[str, Any]:
    """Return the settings in which runs differ, a row for each."""
    runs = []
    for path in paths:
        record = _record(path.parent)
        settings = {
            **(record.get("settings") or {}),
            **{key: record[key] for key in ("data", "signals") if key in record},
        }
        runs.append(RunSummary(name_of(path, root), "", settings=settings))
    return {"rows": differences(runs)}


def _record(folder: Path) -> dict[str, Any]:
    try:
        return read_record(folder) or {}
    except UserError:
        return {}


def _word(value: Any) -> str:
    return "-" if value is None else str(value)[:300]
