"""Trackers that get the metrics besides the JSONL: TensorBoard, trackio or Weights & Biases, chosen by `--log-to`.

The packages are optional (pip install 'indraquantum[tensorboard]', `[trackio]`, `[wandb]`) and are imported only when
they are used. A tracker that fails while the run trains is left behind: the run goes on, and its JSONL is complete.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from indraquantum.errors import UserError, optional_package, reason
from indraquantum.progress import warn

PROJECT = "indraquantum"
Kind = Literal["none", "tensorboard", "trackio", "wandb"]


class NullTracker:
    """A tracker that does nothing."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step, as they are in the JSONL."""

    def flush(self) -> None:
        """Make sure that everything is stored. This is called before each checkpoint."""

    def close(self, failed: bool = False) -> None:
        """Send what is left and close. `failed` says that the run did not come to its end."""


class TensorBoardTracker(NullTracker):
    """Writes event files into `folder`. Events of an earlier run, and steps that are trained again, are hidden."""

    def __init__(self, folder: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=0 if step is None else step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        """As in NullTracker."""
        for name, value in numbers(metrics).items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def flush(self) -> None:
        """As in NullTracker."""
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """As in NullTracker."""
        self._writer.close()


class WandbTracker(NullTracker):
    """Logs to wandb, or to trackio, whose calls are the same.

    Both buffer lines, so a killed run loses some, and neither can replace a step that is trained again. So each start
    of a run is a new run there, which begins with a copy of the lines so far.
    """

    def __init__(self, package: str, folder: Path, settings: dict[str, Any], history: Iterable[dict[str, Any]]) -> None:
        self._package, self._is_wandb = importlib.import_module(package), package == "wandb"
        options = {"project": PROJECT, "name": folder.name}
        if self._is_wandb:  # what its own environment variables say goes first
            options = {name: value for name, value in (options | {"dir": str(folder)}).items() if not _chosen(name)}
        self._package.init(config=settings, resume="never", **options)
        for metrics in history:
            self.log(metrics)

    def log(self, metrics: dict[str, Any]) -> None:
        """As in NullTracker."""
        figures = numbers(metrics)
        self._package.log(figures, step=figures.pop("step"))

    def close(self, failed: bool = False) -> None:
        """As in NullTracker."""
        self._package.finish(**({"exit_code": 1} if failed and self._is_wandb else {}))


def _chosen(option: str) -> bool:
    """Return whether the user has chosen this option of wandb by an environment variable of wandb."""
    return bool(os.environ.get(f"WANDB_{option.upper()}"))


class _Guarded(NullTracker):
    """Passes everything to another tracker until that fails, and then to none: metrics matter less than the run."""

    def __init__(self, kind: Kind, tracker: NullTracker) -> None:
        self._kind, self._tracker = kind, tracker

    def log(self, metrics: dict[str, Any]) -> None:
        """As in NullTracker."""
        self._guard(lambda tracker: tracker.log(metrics))

    def flush(self) -> None:
        """As in NullTracker."""
        self._guard(lambda tracker: tracker.flush())

    def close(self, failed: bool = False) -> None:
        """As in NullTracker."""
        self._guard(lambda tracker: tracker.close(failed))

    def _guard(self, action: Callable[[NullTracker], object]) -> None:
        try:
            action(self._tracker)
        except Exception as error:  # each package has its own errors
            self._tracker = NullTracker()
            warn(
                f"--log-to {self._kind}: the tracker failed and gets no more of this run ({reason(error)}); "
                "metrics.jsonl has everything"
            )


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a step under flat names, without null and without values that are not numbers."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{part}": figure for part, figure in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
    return flat


def require_tracker(kind: Kind) -> None:
    """Import the package of `kind`, so that a run ends at once if it is missing.

    Raises:
        UserError: the package is missing or can't be imported.
    """
    if kind != "none":
        with optional_package("--log-to", kind, kind, f"indraquantum[{kind}]"):
            importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)


def open_tracker(
    kind: Kind, folder: Path, settings: dict[str, Any], step: int | None, history: Iterable[dict[str, Any]] = ()
) -> NullTracker:
    """Start tracking the run that logs to `folder`.

    Args:
        kind: the tracker.
        folder: the run's folder of logs, which has the name of the run.
        settings: the settings of the run.
        step: the last step whose metrics are kept; None for a new run.
        history: the metrics up to `step`, which are read only if they are needed.

    Raises:
        UserError: the tracker can't start, or a line of the history is damaged.
    """
    try:
        if kind == "tensorboard":
            return _Guarded(kind, TensorBoardTracker(folder, step))
        if kind in ("trackio", "wandb"):
            return _Guarded(kind, WandbTracker(kind, folder, settings, history))
    except UserError:
        raise
    except Exception as error:  # not logged in, or no connection: each package has its own errors
        raise UserError("--log-to", kind, f"must be none or a tracker that can start here ({reason(error)})") from None
    return NullTracker()
