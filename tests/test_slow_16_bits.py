"""A processor without units for 16-bit products says how slow these are, wherever a command computes with them."""

from __future__ import annotations

import pytest
import torch

from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.kernels import onednn
from indraquantum.teacher.capture import capture
from indraquantum.training import loop, parallel
from test_ablation import folders, indra, write_plan

SMALL = {
    "d_model": 14, "layers": 2, "heads": 2, "mlp_width": 22, "batch_tokens": 480, "no_teacher": True, "save_every": 1,
    "device": "cpu",
}  # fmt: skip
SLOW = "this processor has no bfloat16 units, so products in {} are many times slower here than in float32"


@pytest.fixture(autouse=True)
def old_processor(monkeypatch):
    monkeypatch.setenv(onednn.VARIABLE, "0")


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: this processor")]


@pytest.mark.parametrize(
    ("device", "precision", "units", "rank", "says"),
    [
        ("cpu", "bfloat16", "0", "0", True),
        ("cpu", "float16", "0", "0", True),
        ("cpu", "mixed", "0", "0", True),
        ("cpu", "float32", "0", "0", False),
        ("cpu", "bfloat16", "1", "0", False),
        ("cuda", "bfloat16", "0", "0", False),
        ("cpu", "bfloat16", "0", "1", False),
    ],
)
def test_only_16_bits_on_a_cpu_without_units_are_slow(monkeypatch, capsys, device, precision, units, rank, says):
    monkeypatch.setenv(onednn.VARIABLE, units)
    monkeypatch.setenv("RANK", rank)
    onednn.note_slow_16_bits(torch.device(device), precision, "capture")
    said = notes(capsys)
    assert len(said) == says
    assert all(SLOW.format(precision) in line and "a new capture with --precision float32" in line for line in said)


def test_a_run_that_asks_for_16_bits_and_one_that_resumes_in_them(world, tmp_path, capsys):
    places = {"data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs"}
    begun = TrainSettings(**places, **SMALL, precision="bfloat16", max_steps=1)
    loop.train(begun)
    assert [SLOW.format("bfloat16") in line for line in notes(capsys)] == [True]
    loop.train(begun)
    assert [SLOW.format("bfloat16") in line for line in notes(capsys)] == [True]
    with pytest.raises(UserError, match="--precision: got float32; must be bfloat16, as in the run that"):
        loop.train(begun.model_copy(update={"precision": "auto"}))
    assert parallel.choose_precision(TrainSettings(), torch.device("cpu")).dtype is torch.float32
    assert notes(capsys) == []


def test_a_capture_that_asks_for_mixed_precision_and_one_that_resumes_in_it(world, tmp_path, capsys):
    begun = CaptureSettings(
        data=world.data, teacher=str(world.teacher), output=tmp_path / "signals", device="cpu", precision="mixed",
        max_positions=1,
    )  # fmt: skip
    capture(begun, shard_positions=48)
    assert [SLOW.format("mixed") in line for line in notes(capsys)] == [True]
    capture(begun.model_copy(update={"precision": "auto", "max_positions": 200}), shard_positions=48)
    assert [SLOW.format("mixed") in line for line in notes(capsys)] == [True]


def test_an_ablation_says_it_before_its_runs_do_in_their_logs(world, tmp_path, capsys):
    plan = write_plan(world, tmp_path)
    assert indra("ablate", plan, *folders(tmp_path), "--device=cpu", "--dry-run") == 0
    assert notes(capsys) == []
    content = plan.read_text().replace("base:", "base:\n  precision: bfloat16", 1)
    plan.write_text(content)
    assert indra("ablate", plan, *folders(tmp_path), "--device=cpu", "--dry-run") == 0
    assert [SLOW.format("bfloat16") in line for line in notes(capsys)] == [True]
