"""The plots of the report, drawn from the runs' JSON files. Each variant has a colour, and after ten a line style."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from indraquantum.ablation.front import SIZES, at_equal_seeds, mean_point, on_front, table_loss
from indraquantum.ablation.results import Result
from indraquantum.evaluation.collapse import CollapseFigures
from indraquantum.files import atomic_file
from indraquantum.monitor.plots import finish_axes

LINES, MARKS = ("-", "--", ":"), ("o", "s", "^")  # of the first ten variants, the next ten, and so on
FEW = 6  # variants whose legend leaves room for the curves
Runs = dict[str, dict[int, Result]]  # finished runs by variant and seed


class _Drawn(NamedTuple):
    record: Result
    # The variant's colour and line style, and its label at the first seed only, so that the legend has it once.
    style: dict[str, Any]


def _each(runs: Runs) -> Iterator[_Drawn]:
    for number, (variant, by_seed) in enumerate(runs.items()):
        for place, seed in enumerate(sorted(by_seed)):
            label = None if place else variant
            yield _Drawn(
                by_seed[seed], {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % 3], "label": label}
            )


def draw_learning_curves(figure: Figure, runs: Runs) -> None:
    """Held-out cross-entropy of each source over the tokens seen, with a line for each seed."""
    sources = dict.fromkeys(source for record, _ in _each(runs) for source in record["curve"][-1]["held_out"])
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False).flat, sources, strict=True):
        for record, style in _each(runs):
            lines = [line for line in record["curve"] if line["held_out"] and line["tokens"]]
            points = [(line["tokens"], line["held_out"][source]) for line in lines]
            axes.plot(*zip(*points, strict=True), linewidth=1, **style)
        finish_axes(axes, f"Held-out documents, {source}", "cross-entropy, nats per token", "tokens seen")


def draw_size_and_loss(figure: Figure, runs: Runs) -> None:
    """Cross-entropy on the table half over the parameters, with 95 % intervals over seeds."""
    axes = figure.subplots()
    for number, (variant, by_seed) in enumerate(runs.items()):
        loss = table_loss(by_seed)
        size = next(iter(by_seed.values()))["parameters"]
        look = {"fmt": MARKS[number // 10 % 3], "color": f"C{number % 10}", "label": variant}
        axes.errorbar(size, loss.mean, yerr=loss.half_width or 0, **look)
    sizes = [record["parameters"] for by_seed in runs.values() for record in by_seed.values()]
    axes.set_xlim(0.9 * min(sizes), 1.1 * max(sizes))  # equal sizes look equal
    finish_axes(axes, "Parameters against loss, table half", "cross-entropy, nats per token", "parameters")


def draw_calibration(figure: Figure, runs: Runs) -> None:
    """Accuracy over confidence, with a line for each seed. The dotted line is perfect calibration."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="grey")
    for record, style in _each(runs):
        axes.plot(record["calibration"]["x"], record["calibration"]["y"], marker=".", linewidth=1, **style)
    finish_axes(axes, "Calibration, table half", "accuracy", "confidence (max p)")


def draw_readouts(figure: Figure, runs: Runs) -> None:
    """The readouts over the teacher's figures. The dotted lines are the targets of the alignment terms."""
    magnitude, phase = figure.subplots(1, 2)
    known = {variant: {s: r for s, r in by_seed.items() if r["readouts"]} for variant, by_seed in runs.items()}
    for record, style in _each(known):
        for axes, name in ((magnitude, "magnitude"), (phase, "phase")):
            axes.plot(record["readouts"][name]["x"], record["readouts"][name]["y"], marker=".", linewidth=1, **style)
    top = math.log(next(_each(known)).record["vocabulary_size"])
    phase.plot([0, top], [0, math.pi], ":", color="grey")
    magnitude.plot([0, 1], [0, 1], ":", color="grey")
    finish_axes(magnitude, "Readout magnitude, table half", "mean |c|", "teacher's confidence")
    finish_axes(phase, "Readout phase, table half", "mean phase, radians", "teacher's entropy, nats")


def draw_collapse(figure: Figure, runs: Runs) -> None:
    """The collapse detectors' figures over the tokens seen."""
    for axes, name in zip(figure.subplots(2, 2).flat, CollapseFigures._fields, strict=True):
        for record, style in _each(runs):
            points = [(line["tokens"], line[name]) for line in record["curve"] if line[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1, **style)
        finish_axes(axes, name.replace("_", " "), "directions" if name == "effective_rank" else "nats", "tokens seen")


def draw_front(figure: Figure, runs: Runs, families: dict[str, tuple[str, ...]]) -> None:
    """Loss of each family over parameters and over work. A ring marks the variants that no other dominates."""
    for axes, (size, title) in zip(figure.subplots(1, 2), SIZES.items(), strict=True):
        for number, (family, variants) in enumerate(families.items()):
            there = [variant for variant in variants if variant in runs]
            points = {variant: mean_point(runs[variant], size) for variant in there}
            line = sorted((point, table_loss(runs[variant]).half_width or 0) for variant, point in points.items())
            places = [point.size for point, _ in line], [point.loss for point, _ in line]
            axes.errorbar(*places, yerr=[half for _, half in line], fmt="o-", color=f"C{number}", label=family)
        equal = at_equal_seeds((variant for variants in families.values() for variant in variants), runs)
        means = {variant: mean_point(by_seed, size) for variant, by_seed in equal.items()}
        best = [mean_point(runs[name], size) for name in on_front(means)]
        axes.plot([p.size for p in best], [p.loss for p in best], "o", markersize=12, mfc="none", color="black")
        axes.set_xscale("log")
        finish_axes(axes, f"Loss over {title}, table half", "cross-entropy, nats per token", title)


PICTURES: dict[str, Callable[[Figure, Runs], None]] = {
    "learning_curves": draw_learning_curves,
    "size_and_loss": draw_size_and_loss,
    "calibration": draw_calibration,
    "readouts": draw_readouts,
    "collapse": draw_collapse,
}


def _put_legend_below(figure: Figure) -> None:
    """Give `figure` one legend below its axes, in place of one in each."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
        if (legend := axes.get_legend()) is not None:
            legend.remove()
    columns = 4
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(named) / columns))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize="small")


def save_picture(folder: Path, name: str, runs: Runs) -> Path:
    """Draw the picture `name` of PICTURES and write it into `folder`."""
    figure = Figure(figsize=(10, 8) if name == "collapse" else (10, 5), layout="constrained")
    PICTURES[name](figure, runs)
    if len(runs) > FEW:
        _put_legend_below(figure)
    return _saved(figure, folder, name)


def save_front(folder: Path, runs: Runs, families: dict[str, tuple[str, ...]]) -> Path:
    """Draw the families' front and write it into `folder`."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    draw_front(figure, runs, families)
    return _saved(figure, folder, "front")


def _saved(figure: Figure, folder: Path, name: str) -> Path:
    path = folder / f"report_{name}.png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    return path
