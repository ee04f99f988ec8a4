"""Parts of an optimiser step by hand: the statistics of the readouts, and the seed of dropout."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from indraquantum.loss_v2 import LossTerms
from indraquantum.processes import ALONE, Processes
from indraquantum.training.engine import Engine, _Totals
from indraquantum.training.parallel import PassResult
from indraquantum.training.step import StepInput


def test_the_statistics_of_the_readouts_by_hand():
    """Two micro-batches: magnitudes 1 and 3, phases 0 and pi/2, whose mean direction is sqrt(1/2) long."""
    totals = _Totals()
    for loss, amplitude in ((2.0, 1 + 0j), (0.5, 3j)):
        terms = LossTerms(torch.tensor(loss), torch.tensor(loss / 2), None, None, None, None)
        totals.add(PassResult(terms, torch.tensor([amplitude])))
    terms, readout = totals.over(ALONE)
    assert (terms["loss"], terms["ce"], terms["kd"]) == (2.5, 1.25, None)
    assert readout == pytest.approx({
        "magnitude_mean": 2.0, "magnitude_std": 1.0, "phase_mean": math.pi / 4, "phase_std": math.pi / 4,
        "phase_circular_variance": 1 - math.sqrt(1 / 2),
    })  # fmt: skip


def test_a_step_without_readouts_has_no_statistics():
    totals = _Totals()
    totals.add(PassResult(LossTerms(*torch.ones(2), None, None, None, None), None))
    assert set(totals.over(ALONE)[1].values()) == {None}


def test_dropout_of_each_step_and_process_has_a_seed_of_its_own(monkeypatch):
    class Seeded(Exception):
        pass

    def record(seed):
        seeds.append(seed)
        raise Seeded

    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", record)
    for seed in (5, 6):
        for rank in (0, 1):
            parallel = SimpleNamespace(processes=Processes(rank, 2), device=torch.device("cpu"))
            engine = Engine(parallel, torch.optim.SGD([torch.zeros(1)]))
            with pytest.raises(Seeded):
                engine.step(StepInput(None, np.arange(3), 1, 0.1, seed=seed))
    assert seeds == [10, 11, 12, 13]
