"""Averages, early stopping and the best checkpoint over several processes: what one process has."""

from __future__ import annotations

import pytest

import forked
import survival
from indraquantum.training.checkpoint import BEST_NAME, load_checkpoint


@pytest.mark.parametrize(
    ("parallel", "options"),
    [("ddp", {"optimizer": "muon"}), pytest.param("fsdp2", {"gradient_checkpointing": True}, marks=pytest.mark.slow)],
)
def test_two_processes_end_where_one_does(world, tmp_path, parallel, options):
    common = {"ema_decay": 0.9, "patience": 3, "keep_best": True, "max_steps": 6, "evaluate_every": 2, "dropout": 0.0}
    common |= {**survival.STEADY, **options}
    alone = survival.small_run(world, tmp_path / "alone", **common)
    assert survival.in_fork(lambda: survival.train_small(alone)) == 0
    both = survival.small_run(world, tmp_path / "both", parallel=parallel, **common)
    said = tmp_path / "said"
    assert forked.run(2, lambda _: survival.train_small(both), said) == [0, 0], forked.said(said)
    for name in ("checkpoint_v4_epoch_1.pt", BEST_NAME):
        expected, found = (load_checkpoint("", run.output / name) for run in (alone, both))
        assert found.step == expected.step
        assert found.best["step"] == expected.best["step"]
        assert found.best["cross_entropy"] == pytest.approx(expected.best["cross_entropy"], abs=1e-4)
        assert found.average.keys() == expected.average.keys()
        for weight, average in expected.average.items():
            # Where a gradient is nearly 0, AdamW makes a step of its rounding: single numbers may differ by more.
            assert (found.average[weight] - average).norm() <= 1e-2 * average.norm(), weight
