"""Where metrics go beside the JSONL: TensorBoard, trackio or Weights & Biases, by `--log-to`, or nowhere.

The packages are no dependencies (pip install 'indraquantum[tensorboard]', `[trackio]`, `[wandb]`) and are imported
when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from indraquantum.errors import UserError, optional_package, reason

PROJECT = "indraquantum"
Kind = Literal["none", "tensorboard", "trackio", "wandb"]


class NullTracker:
    """Takes metrics and does nothing."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step, as the JSONL has them."""

    def flush(self) -> None:
        """Make safe what was taken; called before each checkpoint."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoardTracker(NullTracker):
    """Event files in `folder`; those of a run that was there before are hidden, and of this one what comes again."""

    def __init__(self, folder: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=0 if step is None else step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        """As in NullTracker."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def flush(self) -> None:
        """As in NullTracker."""
        self._writer.flush()

    def close(self) -> None:
        """As in NullTracker."""
        self._writer.close()


class WandbTracker(NullTracker):
    """wandb, or trackio, whose calls are the same.

    Both keep lines for a while before they are safe, so that a kill loses some, and neither takes a line back that is
    trained again. So each start of a run is a run of its own there, which begins with a copy of the lines so far.
    """

    def __init__(self, package: str, folder: Path, settings: dict[str, Any], history: Iterable[dict[str, Any]]) -> None:
        self._package = importlib.import_module(package)
        options = {"dir": str(folder)} if package == "wandb" else {}
        self._package.init(project=PROJECT, name=folder.name, config=settings, resume="never", **options)
        for metrics in history:
            self.log(metrics)

    def log(self, metrics: dict[str, Any]) -> None:
        """As in NullTracker."""
        self._package.log(numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        """As in NullTracker."""
        self._package.finish()


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures of a step by flat names; those that it lacks, and what is no number, are left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{part}": figure for part, figure in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
    return flat


def require_tracker(kind: Kind) -> None:
    """Import the package of `kind`, so that a run without it ends before it begins.

    Raises:
        UserError: it is missing or can't be imported.
    """
    if kind != "none":
        with optional_package("--log-to", kind, kind, f"indraquantum[{kind}]"):
            importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)


def open_tracker(
    kind: Kind, folder: Path, settings: dict[str, Any], step: int | None, history: Iterable[dict[str, Any]] = ()
) -> NullTracker:
    """Start tracking the run that logs to `folder`.

    Args:
        kind: where to.
        folder: the run's logs; its name is the run's.
        settings: what decides the run.
        step: the last step whose metrics are kept; None for a new run.
        history: the metrics up to `step`, read where they are needed.

    Raises:
        UserError: it can't start, or a line of the history is damaged.
    """
    try:
        if kind == "tensorboard":
            return TensorBoardTracker(folder, step)
        if kind in ("trackio", "wandb"):
            return WandbTracker(kind, folder, settings, history)
    except UserError:
        raise
    except Exception as error:  # nobody is logged in, nothing answers: each package has errors of its own
        raise UserError("--log-to", kind, f"must be a tracker that can start here ({reason(error)}), or none") from None
    return NullTracker()
