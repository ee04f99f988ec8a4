"""Where metrics go beside the JSONL: TensorBoard, trackio or Weights & Biases, by `--log-to`, or nowhere.

The packages are no dependencies (pip install 'indraquantum[tensorboard]', `[trackio]`, `[wandb]`) and are imported
when they are asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from indraquantum.errors import optional_package

PROJECT = "indraquantum"
Kind = Literal["none", "tensorboard", "trackio", "wandb"]


class NullTracker:
    """Takes metrics and does nothing."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step, as the JSONL has them."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoardTracker(NullTracker):
    """Event files in `folder`; what a run that goes on from `step` wrote after it is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        """As in NullTracker."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """As in NullTracker."""
        self._writer.close()


class WandbTracker(NullTracker):
    """wandb, or trackio, whose calls are the same."""

    def __init__(self, package: str, name: str, settings: dict[str, Any], **options: object) -> None:
        self._package = importlib.import_module(package)
        self._package.init(project=PROJECT, name=name, config=settings, resume="allow", **options)

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


def open_tracker(kind: Kind, folder: Path, settings: dict[str, Any], step: int) -> NullTracker:
    """Start tracking the run that logs to `folder`.

    Args:
        kind: where to.
        folder: the run's logs; its name is the run's.
        settings: what decides the run.
        step: the last step that was logged before, 0 for a new run.
    """
    if kind == "tensorboard":
        return TensorBoardTracker(folder, step)
    if kind == "trackio":
        return WandbTracker("trackio", folder.name, settings)
    if kind == "wandb":  # its runs go on by id
        return WandbTracker("wandb", folder.name, settings, id=folder.name, dir=str(folder))
    return NullTracker()
