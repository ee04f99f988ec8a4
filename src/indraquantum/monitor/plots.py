"""The monitor's pictures, each a function from a run's metrics to a matplotlib figure.

The notebook shows them one by one; `save_overview` puts all four on one page for the demo and the README.
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
    """The whole objective over the steps, raw and smoothed, with the held-out cross-entropy at its evaluations."""
    _curve(axes, metrics, "loss", "total loss", "C0")
    for number, source in enumerate(_held_out_sources(metrics)):
        points = [(m["step"], m["held_out"][source]) for m in metrics if m["held_out"]]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, "o--", color=f"C{number + 1}", markersize=4, label=f"held-out CE, {source}")
    _finish(axes, "Total loss", "nats per token")


def draw_ce_and_kd(axes: Axes, metrics: Metrics) -> None:
    """Cross-entropy against distillation: learning the text beside imitating the teacher."""
    _curve(axes, metrics, "ce", "CE (text)", "C0")
    _curve(axes, metrics, "kd", "KD (drawn signals, as given)", "C1")
    _curve(axes, metrics, "kd_estimate", "KD (unbiased estimate)", "C2")
    _finish(axes, "Cross-entropy against distillation", "nats per token")


def draw_alignment(axes: Axes, metrics: Metrics) -> None:
    """The phase and the magnitude term: how far the state is from the teacher's entropy and confidence."""
    _curve(axes, metrics, "phase", "phase term (circular distance)", "C3")
    _curve(axes, metrics, "magnitude", "magnitude term (squared error)", "C4")
    _finish(axes, "Alignment with the teacher", "distance")


def draw_stability(axes: Axes, metrics: Metrics) -> None:
    """Mean of the readouts with a band of one standard deviation: a band of no width is a state that has collapsed."""
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
    _finish(axes, "Stability of magnitude and phase", "mean over the batch, band of one std")


PANELS: tuple[Callable[[Axes, Metrics], None], ...] = (draw_total_loss, draw_ce_and_kd, draw_alignment, draw_stability)


def save_overview(path: Path, metrics: Metrics, title: str) -> None:
    """Write the four panels to `path`, whose suffix decides the format."""
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
    _finish(axes, "Learning-rate range test", "nats per token")
    axes.set_xlabel("learning rate")
    figure.savefig(path, format=kind, dpi=110)


def _curve(axes: Axes, metrics: Metrics, name: str, label: str, colour: str) -> None:
    """Draw a metric faintly, and its exponential mean over it; a metric that the run lacks draws nothing."""
    points = [(m["step"], m[name]) for m in metrics if m[name] is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(values, SMOOTHING), color=colour, label=label)


def _held_out_sources(metrics: Metrics) -> list[str]:
    return next((list(m["held_out"]) for m in metrics if m["held_out"]), [])


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="optimiser step", ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
