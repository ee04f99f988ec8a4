"""Options of the trainer in several processes: each does there what it does in one, or is refused by name."""

from __future__ import annotations

import signal

import pytest
import torch

import forked
import survival
from indraquantum.metrics import read_metrics
from indraquantum.training import checkpoint, optimizers
from indraquantum.training.checkpoint import load_checkpoint
from test_parallel_runs import stop_after

LENGTH = {"dropout": 0.0, "epochs": 100, "max_steps": 12, "evaluate_every": 5, "save_every": 4, "layers": 2,
          **survival.STEADY}  # fmt: skip
AVERAGED = {"ema_decay": 0.9, "keep_best": True, "patience": 3, "gradient_checkpointing": True}
TURNED = {"optimizer": "muon"}
STAGED = {"strategy": "stage2-v3-gentle"}
OPTIONS = [
    (AVERAGED, 1e-5), ({"precision": "bfloat16"}, 2e-3), ({"gradient_checkpointing": True}, 1e-5),
    (TURNED, 1e-3), ({"compile": True}, 1e-5), ({"precision": "float16"}, 1e-3),
    ({"projector": "frozen"}, 1e-5), ({"projector": "none", "heads": 1, "no_teacher": True}, 1e-5),
    ({"readout": "mean", "no_teacher": True}, 1e-5), ({"ends": "shared"}, 1e-5), (STAGED, 1e-5),
    ({"head": "born"}, 1e-5), ({"projector": "gated", "residual": True}, 1e-5),
    ({"projector": "none", "heads": 1, "residual_head": "turned", "micro_batch_tokens": 240}, 1e-5),
]  # fmt: skip
REFUSED = [{"precision": "float16"}]  # by FSDP2
CASES = [
    pytest.param(
        kind, changes, near, marks=() if kind == "fsdp2" and changes in (AVERAGED, STAGED, TURNED) else pytest.mark.slow
    )
    for kind in ("ddp", "fsdp2")
    for changes, near in OPTIONS
    if kind == "ddp" or changes not in REFUSED
]


def last_of(settings, changes):
    """The checkpoint to compare."""
    return settings.output / checkpoint.BEST_NAME if changes is AVERAGED else survival.last_checkpoint(settings)


@pytest.mark.filterwarnings("default")  # the compiler emits warnings
@pytest.mark.parametrize(("kind", "changes", "near"), CASES)
def test_an_option_does_what_it_does_in_one_process(world, tmp_path, kind, changes, near):
    one = survival.small_run(world, tmp_path / "one", **{**LENGTH, **changes})
    two = survival.small_run(world, tmp_path / "two", **{**LENGTH, **changes}, parallel=kind)
    if survival.in_fork(lambda: survival.train_small(one), tmp_path / "said"):
        assert "needs a working compiler" in (tmp_path / "said").read_text()
        pytest.skip("no compiler here")

    def stopped(_):
        stop_after(7, 1, signal.SIGTERM)
        survival.train_small(two)

    assert forked.run(2, stopped, tmp_path / "stopped") == [143, 143], forked.said(tmp_path / "stopped")
    assert forked.run(2, lambda _: survival.train_small(two), tmp_path / "again") == [0, 0]
    lines, expected = (read_metrics(s.logs / "run" / "metrics.jsonl") for s in (two, one))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == (other["loss"] and pytest.approx(other["loss"], abs=near))
        assert line["held_out"] == (other["held_out"] and pytest.approx(other["held_out"], abs=near))
    a, b = (load_checkpoint("", last_of(s, changes)) for s in (two, one))
    torch.testing.assert_close((a.model, a.average), (b.model, b.average), rtol=0.01, atol=0.01)
    assert a.best.keys() == b.best.keys()
    assert a.best["step"] == b.best["step"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_each_matrix_is_turned_by_one_process(world, tmp_path, monkeypatch, kind):
    """3 processes and the 14 matrices of 2 layers: five chunks, in the last of which one has nothing to do."""
    settings = survival.small_run(world, tmp_path, **{**LENGTH, **TURNED, "max_steps": 1}, parallel=kind)
    turn = optimizers.orthogonal

    def counted(rank):
        def one(matrix, dtype):
            with (tmp_path / f"turned{rank}").open("a") as file:
                file.write(f"{matrix.shape[0] * matrix.shape[1]}\n")
            return turn(matrix, dtype)

        monkeypatch.setattr(optimizers, "orthogonal", one)
        survival.train_small(settings)

    assert forked.run(3, counted, tmp_path / "said") == [0, 0, 0]
    turned = [(tmp_path / f"turned{rank}").read_text().split() for rank in range(3)]
    assert [len(sizes) for sizes in turned] == [5, 5, 4]
    width, inner = settings.width, settings.mlp_width_or_default
    assert sorted(int(size) for sizes in turned for size in sizes) == sorted(
        2 * (4 * [width * width] + 3 * [width * inner])
    )


@pytest.mark.parametrize("changes", REFUSED)
def test_what_shards_cannot_do_is_refused(world, tmp_path, changes):
    settings = survival.small_run(world, tmp_path, **{**LENGTH, **changes}, parallel="fsdp2")
    assert forked.run(2, lambda _: survival.train_small(settings), tmp_path) == [2, 2]
    (name,) = changes
    assert forked.said(tmp_path).count(f"indra: error: --{name}: ") == 1
    assert "with --parallel fsdp2" in forked.said(tmp_path)
    assert not list(settings.output.glob("*.pt"))
