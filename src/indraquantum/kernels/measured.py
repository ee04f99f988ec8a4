"""Finds the quickest way to compute on this machine: it is measured once, in a quarter of a second, and kept.

One thread is measured by its CPU time, which other programs change little. `ways.json` in this program's cache folder
keeps the choice for each processor and version of torch, so that each start uses the same one. Remove the file to
measure again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from indraquantum.errors import UserError
from indraquantum.files import cache_folder, write_json
from indraquantum.kernels import onednn
from indraquantum.kernels.arguments import ObjectiveOptions, check_inputs
from indraquantum.kernels.attach import differentiable_objective
from indraquantum.kernels.cpu import cpu_plan
from indraquantum.kernels.ways import USUAL, Way, asked_for, parsed, using
from indraquantum.processor import processor_name

TILES = (2000, 4000)  # besides the usual one; with 256 rows a step writes 2 KiB for each token, and reads as much
GAIN = 1.03  # a way must be quicker by this factor, because two measurements may differ by as much
ROWS, WIDTH, VOCABULARY = 256, 256, 4000  # of the objective that is timed
ROUNDS = 2


def quickest_way() -> Way:
    """Return the way that the environment asks for, else the kept one, else measure one now and keep it."""
    if (asked := asked_for()) is not None:
        return asked
    try:
        path, name = cache_folder() / "ways.json", _machine()
    except UserError:  # there is no place to keep it
        return measure()
    known = _read(path)
    if name in known:
        return known[name]
    way = measure()
    known[name] = way
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {machine: str(way) for machine, way in known.items()})
    except OSError:
        pass  # it is measured again at the next start
    return way


def kept_way() -> Way | None:
    """Return the way that was measured on this machine before; None if there is none."""
    return _read(cache_folder() / "ways.json").get(_machine())


def way_for(device: torch.device) -> Way:
    """Return the quickest way for the CPU. Other devices do not use it and get the usual one."""
    return quickest_way() if device.type == "cpu" else asked_for() or USUAL


def measure(seconds_of: Callable[[Way], float] | None = None) -> Way:
    """Return the quickest of the exact ways: first choose the products, then the tile.

    Args:
        seconds_of: returns the seconds that a way takes; None times the objective.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds_of = seconds_of or _objective_seconds()
        best = USUAL if onednn.is_exact() else Way("torch")
        others = [Way("torch")] if best.products == "onednn" else []
        best = _better(best, others, seconds_of)
        return _better(best, [replace(best, tile=tile) for tile in TILES], seconds_of)
    finally:
        torch.set_num_threads(threads)


def _better(best: Way, others: list[Way], seconds_of: Callable[[Way], float]) -> Way:
    """Return the quickest of `others` if it is clearly quicker than `best`. All take turns; the least time counts."""
    least = dict.fromkeys([best, *others], float("inf"))
    for _ in range(ROUNDS):
        for way in least:
            least[way] = min(least[way], seconds_of(way))
    quickest = min(least, key=least.__getitem__)
    return quickest if least[best] > GAIN * least[quickest] else best


def _objective_seconds() -> Callable[[Way], float]:
    """Return a function that times a way on one chunk of the objective, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    states, table = (torch.randn(n, WIDTH, generator=generator).mul_(0.1) for n in (ROWS, VOCABULARY))
    inputs = check_inputs(
        states.requires_grad_(), table.requires_grad_(), torch.zeros(ROWS, dtype=torch.long), bias_V=None, scale=None,
        signal_ids_NK=None, signal_probs_NK=None, token_count=None,
    )  # fmt: skip

    def seconds_of(way: Way) -> float:
        with using(way), torch.enable_grad():
            plan = cpu_plan(VOCABULARY, torch.float32, rows=ROWS, lanes=1)
            start = time.thread_time()
            differentiable_objective(inputs, ObjectiveOptions(), plan)
            return time.thread_time() - start

    seconds_of(USUAL)  # libraries set themselves up at first use
    return seconds_of


def _machine() -> str:
    """Return everything that the choice depends on, as text."""
    try:
        name = processor_name()
    except (OSError, subprocess.CalledProcessError):
        name = platform.machine()
    parts = (name, torch.backends.cpu.get_cpu_capability())
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "any")
    return ", ".join([*parts, f"oneDNN {isa}", f"torch {torch.__version__}"])


def _read(path: Path) -> dict[str, Way]:
    """Return the kept ways; none if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: parsed("ways.json", way) for name, way in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, UserError):
        return {}
