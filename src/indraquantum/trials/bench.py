"""Measures the speed and memory of the objective beside the machine's own limit; `indra bench` prints the figures.

Every figure is a ratio of medians from one run in which the candidates take turns, so that other load slows all of them
alike. Run it on an idle machine: `indra bench --json-file figures.json`.

Legend: N rows (token positions), D real width, V vocabulary, K kept teacher tokens of a row.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from indraquantum.memory import held_bytes, peak_bytes, restart_peak
from indraquantum.tables import text_table

CUBE = 2048  # the square matrix product whose rate stands for the machine's limit
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Figure:
    """One measured number and its goal."""

    name: str
    value: float | None  # None if it can't be measured on this system
    unit: str
    goal: float | None  # None if the number has no goal
    is_upper_limit: bool  # whether the goal is the most, not the least
    detail: str

    @property
    def is_reached(self) -> bool | None:
        """Whether the goal is met. It always is if there is no goal; None if the value is unknown."""
        if self.goal is None:
            return True
        if self.value is None:
            return None
        return self.value <= self.goal if self.is_upper_limit else self.value >= self.goal


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    num_rows: int = 2048
    width: int = 256
    vocabulary: int = 32_000
    kept: int = 16

    def __str__(self) -> str:
        return f"N {self.num_rows}, D {self.width}, V {self.vocabulary}, K {self.kept}"

    @property
    def flops(self) -> int:
        """Of forward and backward: three matrix products of N x D x V."""
        return 6 * self.num_rows * self.width * self.vocabulary


def interleaved_seconds(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each candidate, which all take turns, after one round that is not measured.

    The order changes from round to round, so that no candidate always follows the same other one.

    Args:
        candidates: the functions to time, by name.
        repeats: number of measured rounds.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats + 1):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            candidates[name]()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def objective_speed(shape: Shape = Shape(), repeats: int = 7) -> list[Figure]:
    """Time the objective, forward and backward, beside plain PyTorch and a large matrix product."""
    import torch

    from indraquantum.kernels.onednn import is_exact, onednn_products
    from indraquantum.kernels.ways import Way, in_force, using

    case = _Case(shape)
    square = torch.randn(CUBE, CUBE)
    product = torch.empty_like(square)

    def matmul() -> None:
        torch.mm(square, square, out=product)

    def matmul_by_onednn() -> None:
        with using(Way("onednn")), onednn_products(torch.device("cpu")):
            matmul()

    seconds = interleaved_seconds(
        {
            "matmul": matmul,
            "onednn": matmul_by_onednn,
            "plain": case.plain,
            "ce": case.cross_entropy,
            "kd": case.distillation,
            "no_grad": case.without_gradients,
        },
        repeats,
    )
    limit = 2 * CUBE**3 / seconds["matmul"]
    rate = shape.flops / seconds["ce"]
    medians = f"medians of {repeats} rounds, {torch.get_num_threads()} threads, {shape}"
    tokens_per_second = {name: shape.num_rows / seconds[name] for name in seconds}
    return [
        Figure("matmul_rate", limit / 1e9, "GFLOP/s", None, False, f"{CUBE}-cube float32 product"),
        Figure(
            "matmul_rate_onednn", 2 * CUBE**3 / seconds["onednn"] / 1e9, "GFLOP/s", None, False,
            f"the same by oneDNN{'' if is_exact() else ', which rounds here'}; this machine computes by {in_force()}",
        ),
        Figure("objective_rate", rate / 1e9, "GFLOP/s", None, False, f"CE alone, {medians}"),
        Figure("objective_share_of_matmul_rate", rate / limit, "", 0.75, False, "CE alone"),
        Figure(
            "speedup_over_plain", seconds["plain"] / seconds["ce"], "x", 2.6, False,
            f"{tokens_per_second['ce']:.0f} against {tokens_per_second['plain']:.0f} tokens/s",
        ),
        Figure(
            "distillation_cost", seconds["kd"] / seconds["ce"], "x", 1.05, True,
            f"CE + KD of {shape.kept} ids a row against CE alone",
        ),
        Figure("evaluation_cost", seconds["no_grad"] / seconds["ce"], "x", None, True, "no_grad, CE + KD"),
    ]  # fmt: skip


def objective_memory(rows: Sequence[int] = (512, 4096, 65_536), shape: Shape = Shape()) -> list[Figure]:
    """Measure the memory beyond inputs and gradients for each number of rows, each in its own process."""
    figures = []
    for num_rows in rows:
        extra = bytes_measured_by("indraquantum.trials.bench", num_rows, shape.width, shape.vocabulary, shape.kept)
        detail = f"CE + KD forward and backward, N {num_rows}"
        value = None if extra is None else extra / MEBIBYTE
        figures.append(Figure(f"extra_memory_{num_rows}", value, "MiB", 64.0, True, detail))
    return figures


def bytes_measured_by(module: str, *arguments: object) -> int | None:
    """Return what `python -m module arguments` measures in its own process; None if it fails."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        said = f"ended with status {done.returncode}; its memory is unknown"
        print(f"warning: python -m {module} {said}", file=sys.stderr)
        return None
    return json.loads(done.stdout.split()[-1])


def figures_table(figures: Sequence[Figure]) -> str:
    """Return one line for each figure: name, value, goal, and whether it is met."""
    rows = []
    for figure in figures:
        goal = "" if figure.goal is None else f"{'at most' if figure.is_upper_limit else 'at least'} {figure.goal}"
        verdict = "" if figure.goal is None else {True: "yes", False: "NO", None: "?"}[figure.is_reached]
        value = "unknown" if figure.value is None else f"{figure.value:.3g} {figure.unit}".strip()
        rows.append([figure.name, value, goal, verdict, figure.detail])
    return text_table((), rows, left=(0, 2, 3, 4))


def figures_json(figures: Sequence[Figure]) -> str:
    """Return the figures as JSON, with the machine's versions."""
    import torch

    rows: list[dict[str, Any]] = [asdict(figure) | {"is_reached": figure.is_reached} for figure in figures]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return json.dumps({"machine": machine, "figures": rows}, indent=2)


class _Case:
    """Random inputs, and the calls that are timed on them."""

    def __init__(self, shape: Shape) -> None:
        import torch

        from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals

        generator = torch.Generator().manual_seed(0)
        rows, kept, vocabulary = shape.num_rows, shape.kept, shape.vocabulary
        self.states_ND = torch.randn(rows, shape.width, generator=generator).mul_(0.3).requires_grad_()
        self.table_VD = torch.randn(vocabulary, shape.width, generator=generator).mul_(0.3).requires_grad_()
        self.labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
        self.signals = TeacherSignals(
            torch.randint(0, vocabulary, (rows, kept), generator=generator), torch.full((rows, kept), 1 / kept),
            torch.rand(rows, generator=generator), torch.rand(rows, generator=generator),
        )  # fmt: skip
        self.alone, self.distilled = SemanticDistillationLoss(0.0), SemanticDistillationLoss(0.05)

    def plain(self) -> None:
        """Plain PyTorch: full logits."""
        import torch.nn.functional as F

        self._forget()
        F.cross_entropy(self.states_ND @ self.table_VD.T, self.labels_N).backward()

    def cross_entropy(self) -> None:
        """The objective without a teacher."""
        self._forget()
        self.alone(self.states_ND, self.table_VD, self.labels_N).total.backward()

    def distillation(self) -> None:
        """The objective with a teacher."""
        self._forget()
        self.distilled(self.states_ND, self.table_VD, self.labels_N, signals=self.signals).total.backward()

    def without_gradients(self) -> None:
        """Values only."""
        import torch

        with torch.no_grad():
            self.distilled(self.states_ND, self.table_VD, self.labels_N, signals=self.signals)

    def _forget(self) -> None:
        self.states_ND.grad = self.table_VD.grad = None


def _extra_bytes(shape: Shape) -> int | None:
    """Peak of this process over one step, minus what it held before and minus the gradients."""
    case = _Case(shape)
    _Case(Shape(64, shape.width, 2048, shape.kept)).distillation()  # libraries initialise at their first use
    # If the peak can't be restarted, it replaces what is held now. A higher peak makes the figure smaller.
    before = held_bytes() if restart_peak() else peak_bytes()
    case.distillation()
    after = peak_bytes()
    if before is None or after is None:
        return None
    return after - before - 4 * (case.states_ND.numel() + case.table_VD.numel())


if __name__ == "__main__":
    print(json.dumps(_extra_bytes(Shape(*map(int, sys.argv[1:])))))
