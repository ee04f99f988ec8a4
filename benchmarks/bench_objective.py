"""Speed and memory of the objective: `python benchmarks/bench_objective.py [--quick] [--json FILE]`.

Run it on an idle machine; every figure is a ratio measured side by side. `indra bench` prints the same figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from indraquantum.kernels.measured import quickest_way
from indraquantum.kernels.ways import put_in_force
from indraquantum.trials.bench import Shape, figures_json, figures_table, objective_memory, objective_speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    put_in_force(quickest_way())
    if arguments.quick:
        shape = Shape(128, 32, 1000, 4)
        figures = objective_speed(shape, repeats=2) + objective_memory((128,), shape)
    else:
        figures = objective_speed(repeats=arguments.repeats) + objective_memory()
    print(figures_table(figures))
    if arguments.json:
        arguments.json.write_text(figures_json(figures) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
