"""What the monitor's list says about a run. It reads only the end of the metrics, however long they are.

`indra runs` reads all lines instead, because it also checks them and looks for the best evaluation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from indraquantum.errors import UserError
from indraquantum.files import without_nan
from indraquantum.metrics import read_record
from indraquantum.monitor.runs import name_of, state_of
from indraquantum.monitor.tail import Tail


@dataclass(frozen=True)
class Overview:
    """A run as the monitor's list shows it."""

    name: str  # its folder, below the logs
    state: str  # see `runs.state_of`; or damaged
    problem: str = ""  # what is damaged
    collapse: list[str] = field(default_factory=list)  # the kinds that the last line suspects
    strategy: str | None = None
    steps: int = 0
    total_steps: int | None = None
    tokens: int = 0
    loss: float | None = None
    held_out: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    tokens_per_second: float | None = None  # median of the last steps
    seconds_left: float | None = None  # at the speed of the last steps, without evaluations
    seconds_since: float = 0.0  # since the last line


def overview_of(metrics_path: Path, root: Path) -> Overview:
    """Read run.json and the end of the metrics. If one is damaged, the overview says so."""
    folder, name = metrics_path.parent, name_of(metrics_path, root)
    try:
        record = read_record(folder) or {}
    except UserError as error:
        return Overview(name, "damaged", f"run.json: {error.allowed}")
    try:
        about = metrics_path.stat()
        tail = Tail(metrics_path, about.st_size)
        held_out = tail.held_out
    except OSError as error:
        return Overview(name, "damaged", f"metrics.jsonl: can't be read ({error.strerror})")
    last = tail.metrics[-1] if tail.metrics else {}
    kinds = tail.collapse
    state, total = state_of(folder, record, lambda: kinds), record.get("total_steps")
    return Overview(
        name, state, collapse=kinds, strategy=_text(record.get("settings", {}).get("strategy")), total_steps=total,
        steps=_whole(last.get("step")), tokens=_whole(last.get("tokens")), loss=_number(last.get("loss")),
        held_out=held_out, seconds_since=max(0.0, time.time() - about.st_mtime),
        **(_speed(tail.metrics, total) if state == "running" else {}),
    )  # fmt: skip


def _speed(metrics: list[dict[str, Any]], total: int | None) -> dict[str, float | None]:
    """Return the fields of Overview that the speed of the last steps decides."""
    figures = [
        (step, tokens, speed) for found in metrics
        for step, tokens, speed in [[_number(found.get(name)) for name in ("step", "tokens", "tokens_per_second")]]
        if step is not None and tokens is not None and speed
    ]  # fmt: skip
    if len(figures) < 2:
        return {}
    seconds = [(now[1] - before[1]) / now[2] for before, now in pairwise(figures)]
    steps = figures[-1][0] - figures[0][0]
    speeds = sorted(speed for _, _, speed in figures)
    left = None if total is None or steps <= 0 else max(0.0, (total - figures[-1][0]) * sum(seconds) / steps)
    return without_nan({"tokens_per_second": speeds[len(speeds) // 2], "seconds_left": left})


def _number(value: Any) -> float | None:
    return value if type(value) is float or (type(value) is int and abs(value) < 2**53) else None


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None
