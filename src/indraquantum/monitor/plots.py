"""Plots of a run's metrics. Each function draws one of them with matplotlib.

The notebook shows them one by one. `save_overview` puts all four into one picture, for the demo and the README. They
draw the same curves as the page of `indra monitor`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from indraquantum.files import atomic_file
from indraquantum.monitor.curves import DECAYS, Curves

SMOOTHING = DECAYS[0]  # of the exponential mean that is drawn over the raw curve


def draw_total_loss(axes: Axes, curves: Curves) -> None:
    """Draw the total loss over the steps, raw and smoothed, and the held-out cross-entropy at each evaluation."""
    _curve(axes, curves, "loss", "total loss", "C0")
    for number, source in enumerate(curves.sources):
        steps, values = curves.held_out_of(source)
        axes.plot(steps, values, "o--", color=f"C{number + 1}", markersize=4, label=f"held-out CE, {source}")
    finish_axes(axes, "Total loss", "nats per token")


def draw_ce_and_kd(axes: Axes, curves: Curves) -> None:
    """Draw cross-entropy and distillation: learning the text, and imitating the teacher."""
    _curve(axes, curves, "ce", "CE (text)", "C0")
    _curve(axes, curves, "kd", "KD (against the signals)", "C1")
    _curve(axes, curves, "kd_estimate", "KD (unbiased estimate)", "C2")
    finish_axes(axes, "Cross-entropy against distillation", "nats per token")


def draw_alignment(axes: Axes, curves: Curves) -> None:
    """Draw the phase and the magnitude term: how far the state is from the teacher's entropy and confidence."""
    _curve(axes, curves, "phase", "phase term (circular distance)", "C3")
    _curve(axes, curves, "magnitude", "magnitude term (squared error)", "C4")
    finish_axes(axes, "Alignment with the teacher", "distance")


def draw_stability(axes: Axes, curves: Curves) -> None:
    """Draw the mean of the readouts with a band of one standard deviation. A band without width means a collapse."""
    for name, unit, colour in (("magnitude", "", "C4"), ("phase", " (radians)", "C3")):
        steps, mean = curves.series(f"{name}_mean")
        _, std = curves.series(f"{name}_std")
        if len(steps) and len(mean) == len(std):
            axes.plot(steps, mean, color=colour, label=f"{name}{unit}")
            axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2)
    finish_axes(axes, "Stability of magnitude and phase", "mean over the batch, with a band of one std")


def draw_runs(axes: Axes, runs: dict[str, Curves], name: str, title: str, unit: str) -> None:
    """Draw one metric of several runs over each other, smoothed; of the total loss also the held-out cross-entropy."""
    for number, (run, curves) in enumerate(runs.items()):
        _curve(axes, curves, name, run, f"C{number}")
        if name == "loss" and "all" in curves.sources:
            axes.plot(*curves.held_out_of("all"), "o--", color=f"C{number}", markersize=4, label=f"held-out CE, {run}")
    finish_axes(axes, title, unit)


PANELS: tuple[Callable[[Axes, Curves], None], ...] = (draw_total_loss, draw_ce_and_kd, draw_alignment, draw_stability)


def save_overview(path: Path, curves: Curves, title: str) -> None:
    """Write the four plots to `path`, whose suffix decides the format."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    for axes, draw in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        draw(axes, curves)
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


def _curve(axes: Axes, curves: Curves, name: str, label: str, colour: str) -> None:
    """Draw a metric faintly, and its exponential mean over it. Nothing is drawn if the run does not have the metric."""
    steps, values = curves.series(name)
    if not len(steps):
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(*curves.series(f"{name}@{SMOOTHING}"), color=colour, label=label)


def finish_axes(axes: Axes, title: str, unit: str, x: str = "optimiser step") -> None:
    """Give a picture its title, the names of its axes, a grid and, if it has named curves, a legend."""
    axes.set(title=title, xlabel=x, ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
