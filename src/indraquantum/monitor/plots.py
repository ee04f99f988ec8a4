"""Plots of a run's metrics. Each function draws one of them with matplotlib.

The notebook shows them one by one. `save_overview` puts all four into one picture, for the demo and the README.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from indraquantum.files import atomic_file
from indraquantum.smoothing import smoothed

Metrics = list[dict[str, Any]]
SMOOTHING = 0.9  # of the exponential mean that is drawn over the raw curve


def draw_total_loss(axes: Axes, metrics: Metrics) -> None:
    """Draw the total loss over the steps, raw and smoothed, and the held-out cross-entropy at each evaluation."""
    _curve(axes, metrics, "loss", "total loss", "C0")
    for number, source in enumerate(_held_out_sources(metrics)):
        points = [(m["step"], m["held_out"][source]) for m in metrics if m["held_out"]]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, "o--", color=f"C{number + 1}", markersize=4, label=f"held-out CE, {source}")
    finish_axes(axes, "Total loss", "nats per token")


def draw_ce_and_kd(axes: Axes, metrics: Metrics) -> None:
    """Draw cross-entropy and distillation: learning the text, and imitating the teacher."""
    _curve(axes, metrics, "ce", "CE (text)", "C0")
    _curve(axes, metrics, "kd", "KD (against the signals)", "C1")
    _curve(axes, metrics, "kd_estimate", "KD (unbiased estimate)", "C2")
    finish_axes(axes, "Cross-entropy against distillation", "nats per token")


def draw_alignment(axes: Axes, metrics: Metrics) -> None:
    """Draw the phase and the magnitude term: how far the state is from the teacher's entropy and confidence."""
    _curve(axes, metrics, "phase", "phase term (circular distance)", "C3")
    _curve(axes, metrics, "magnitude", "magnitude term (squared error)", "C4")
    finish_axes(axes, "Alignment with the teacher", "distance")


def draw_stability(axes: Axes, metrics: Metrics) -> None:
    """Draw the mean of the readouts with a band of one standard deviation. A band without width means a collapse."""
    for name, unit, colour in (("magnitude", "", "C4"), ("phase", " (radians)", "C3")):
        rows = [m for m in metrics if m[f"{name}_mean"] is not None]
        steps = [m["step"] for m in rows]
        mean, std = ([m[f"{name}_{part}"] for m in rows] for part in ("mean", "std"))
        axes.plot(steps, mean, color=colour, label=f"{name}{unit}")
        axes.fill_between(
            steps,
            [m - s for m, s in zip(mean, std, strict=True)],
            [m + s for m, s in zip(mean, std, strict=True)],
            color=colour,
            alpha=0.2,
        )
    finish_axes(axes, "Stability of magnitude and phase", "mean over the batch, with a band of one std")


PANELS: tuple[Callable[[Axes, Metrics], None], ...] = (draw_total_loss, draw_ce_and_kd, draw_alignment, draw_stability)


def save_overview(path: Path, metrics: Metrics, title: str) -> None:
    """Write the four plots to `path`, whose suffix decides the format."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    for axes, draw in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        draw(axes, metrics)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=110)


def save_range_test(
    path: Path, kind: str, rates: list[float], losses: list[float], smoothed: list[float], suggested: float | None
) -> None:
    """Write the loss over the learning rate to `path` as a `kind` of picture; the suggested rate is a line."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(rates, smoothed, color="C0", label="total loss, smoothed")
    if suggested is not None:
        axes.axvline(suggested, color="C1", linestyle="--", label=f"suggested: {suggested:.1e}")
    axes.set_xscale("log")
    finish_axes(axes, "Learning-rate range test", "nats per token", "learning rate")
    figure.savefig(path, format=kind, dpi=110)


def _curve(axes: Axes, metrics: Metrics, name: str, label: str, colour: str) -> None:
    """Draw a metric faintly, and its exponential mean over it. Nothing is drawn if the run does not have the metric."""
    points = [(m["step"], m[name]) for m in metrics if m[name] is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(values, SMOOTHING), color=colour, label=label)


def _held_out_sources(metrics: Metrics) -> list[str]:
    return next((list(m["held_out"]) for m in metrics if m["held_out"]), [])


def finish_axes(axes: Axes, title: str, unit: str, x: str = "optimiser step") -> None:
    """Give a picture its title, the names of its axes, a grid and, if it has named curves, a legend."""
    axes.set(title=title, xlabel=x, ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
