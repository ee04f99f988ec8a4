"""Where a training step spends its time, as a table and a picture: `python benchmarks/step_parts.py [--plot FILE]`.

The parts of `training.step.optimizer_step` are timed one by one at the user's sizes, and beside them, outside of the
sum, the optimiser with its matrices turned in the other format; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from indraquantum.bench_step import RandomSignals, StepShape, student, synthetic_split
from indraquantum.config import TrainSettings
from indraquantum.kernels.measured import quickest_way
from indraquantum.kernels.onednn import onednn_products
from indraquantum.kernels.ways import put_in_force
from indraquantum.learner import to_tensors
from indraquantum.loss_v2 import SemanticDistillationLoss
from indraquantum.training import optimizers

CHOSEN = optimizers.turning_format("cpu")
OTHER = torch.float32 if CHOSEN is torch.bfloat16 else torch.bfloat16
OPTIMISER = f"Muon ({str(CHOSEN).removeprefix('torch.')}) and AdamW"
INSTEAD = f"the same in {str(OTHER).removeprefix('torch.')}"


@onednn_products()
def measure(shape: StepShape, repeats: int) -> dict[str, float]:
    """Median seconds of each part, in the order in which they come."""
    split, model = synthetic_split(shape), student(shape)
    signals = RandomSignals(shape, split.num_tokens)
    optimizer = optimizers.new_optimizer(model, TrainSettings())
    objective = SemanticDistillationLoss(kd_weight=0.05, phase_weight=0.1, magnitude_weight=0.1)
    seconds: dict[str, list[float]] = defaultdict(list)
    for round_number in range(repeats + 1):
        last = time.perf_counter()

        def done(part: str, keep: bool = round_number > 0) -> None:
            nonlocal last
            now = time.perf_counter()
            if keep:  # the first round warms up
                seconds[part].append(now - last)
            last = now

        optimizer.zero_grad(set_to_none=True)
        batch = split.batch(np.arange(shape.rows))
        labelled = batch.labels.reshape(-1) >= 0
        teacher = signals.batch("train", batch.index.reshape(-1)[labelled])
        done("data")
        table_VD = model.lift_table()
        leaf_VD = table_VD.detach().requires_grad_()
        done("lift the table")
        states_ND = model.hidden_states(**to_tensors(batch, torch.device("cpu")), table_VD=leaf_VD).flatten(0, 1)
        states_ND = states_ND[torch.from_numpy(np.flatnonzero(labelled))]
        amplitude_N = model.amplitude(states_ND)
        done("layers, forward")
        labels_N = torch.from_numpy(batch.labels.reshape(-1)[labelled])
        terms = objective(states_ND, leaf_VD, labels_N, model.bias_V, model.scale, teacher, amplitude_N)
        done("objective, values and gradients")
        terms.total.backward()
        done("layers, backward")
        table_VD.backward(leaf_VD.grad)
        done("lift, backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done("clip")
        optimizer.step()
        done(OPTIMISER)
        optimizers.turning_format = lambda _: OTHER
        optimizer.step()
        done(INSTEAD)
        optimizers.turning_format = lambda _: CHOSEN
    return {part: statistics.median(measured) for part, measured in seconds.items()}


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
