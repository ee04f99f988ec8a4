"""Where a training step spends its time, as a table and a picture: `python benchmarks/step_parts.py [--plot FILE]`.

It times the engine's own step, part by part, at the sizes of `indra train` on real text. Beside them, outside of the
sum, stands the optimiser with Muon's matrices in the other format. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from matplotlib.figure import Figure

from indraquantum.config import TrainSettings
from indraquantum.kernels.measured import quickest_way
from indraquantum.kernels.ways import put_in_force
from indraquantum.training import engine as engines
from indraquantum.training import optimizers
from indraquantum.training.engine import Engine
from indraquantum.training.parallel import SingleProcess
from indraquantum.trials.bench_step import StepShape, student, synthetic_split, taught_step

CHOSEN = optimizers.turning_format("cpu")
OTHER = torch.float32 if CHOSEN is torch.bfloat16 else torch.bfloat16
OPTIMISER = f"Muon ({str(CHOSEN).removeprefix('torch.')}) and AdamW"
INSTEAD = f"the same in {str(OTHER).removeprefix('torch.')}"


class Clock:
    """Splits the time of a step at the calls that it makes."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._last = time.perf_counter()

    def done(self, part: str | None) -> None:
        """The time since the last call was that of `part`; None drops it."""
        now = time.perf_counter()
        if part is not None:
            self.seconds[part].append(now - self._last)
        self._last = now

    def around(self, function: Callable, before: str | None, after: str | None) -> Callable:
        """`function`, with `before` done when it is called and `after` when it returns."""

        def timed(*arguments: object, **options: object) -> object:
            if before is not None:
                self.done(before)
            result = function(*arguments, **options)
            if after is not None:
                self.done(after)
            return result

        return timed


def measure(shape: StepShape, repeats: int) -> dict[str, float]:
    """Median seconds of each part, in the order in which they come."""
    model = student(shape)
    optimizer = optimizers.new_optimizer(model, TrainSettings())
    engine, step, clock = Engine(SingleProcess(model), optimizer), taught_step(shape, synthetic_split(shape)), Clock()
    objective = clock.around(engine.objective(step), "layers, forward", "objective, values and gradients")

    def lifted(lift: Callable[[], torch.Tensor] = model.lift_table) -> torch.Tensor:
        clock.done("checks and data")
        table_VD = lift()
        table_VD.register_hook(lambda _: clock.done("layers, backward"))
        clock.done("lift the table")
        return table_VD

    backward = clock.around(torch.Tensor.backward, None, "lift, backward")
    clip = clock.around(engines.clip_gradients, "figures", "clip")
    with (
        mock.patch.object(model, "lift_table", lifted),
        mock.patch.object(engine, "objective", return_value=objective),
        mock.patch.object(torch.Tensor, "backward", lambda tensor: backward(tensor)),
        mock.patch.object(engines, "clip_gradients", clip),
        mock.patch.object(optimizer, "step", clock.around(optimizer.step, None, OPTIMISER)),
    ):
        for _ in range(repeats + 1):
            clock.done(None)
            engine.step(step)
    for _ in range(repeats + 1):
        with mock.patch.object(optimizers, "turning_format", return_value=OTHER):
            clock.done(None)
            optimizer.step()
            clock.done(INSTEAD)
    return {part: statistics.median(measured[1:]) for part, measured in clock.seconds.items()}  # the first warms up


def draw(path: Path, seconds: dict[str, float], title: str) -> None:
    """One bar a part, with its share of the step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    total = sum(seconds.values())
    names = list(seconds)[::-1]
    bars = axes.barh(names, [seconds[name] for name in names], color="C0")
    axes.bar_label(bars, [f" {seconds[name] / total:.1%}" for name in names])
    axes.set(xlabel="seconds a step", title=title)
    axes.margins(x=0.1)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--plot", type=Path, help="draw the picture here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    put_in_force(quickest_way())
    shape = StepShape()
    seconds = measure(shape, arguments.repeats)
    instead = seconds.pop(INSTEAD)
    total = sum(seconds.values())
    for part, value in seconds.items():
        print(f"{part:<34} {value * 1000:8.1f} ms  {value / total:6.1%}")
    print(f"{'the step':<34} {total * 1000:8.1f} ms  {shape.step_tokens / total:.0f} tokens/s")
    print(f"{INSTEAD:<34} {instead * 1000:8.1f} ms  {instead / seconds[OPTIMISER]:6.2f}x")
    if arguments.plot:
        sizes = f"d_model {shape.d_model}, {shape.layers} layers, V {shape.vocabulary:,}"
        draw(arguments.plot, seconds, f"A step of {shape.step_tokens:,} tokens: {sizes}")


if __name__ == "__main__":
    main()
