"""What is not a number stops the run before the update, with exit status 3, and never reaches the disk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import survival
from indraquantum import cli
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import OutOfMemory, TrainingStopped
from indraquantum.evaluation import held_out
from indraquantum.metrics import read_metrics
from indraquantum.teacher.signals import SignalStore
from indraquantum.training import loop
from indraquantum.training.checkpoint import newest_checkpoint
from indraquantum.training.engine import Engine
from indraquantum.training.schedule import rows_of_step


def bad(name: str, places: list[str], infinite: list[str]):
    """Parametrise a test with NaN in each of the places, and with infinity: quickly in those named, slowly in all."""
    cases = [pytest.param(place, math.nan) for place in places]
    cases += [pytest.param(place, math.inf, marks=() if place in infinite else pytest.mark.slow) for place in places]
    return pytest.mark.parametrize((name, "value"), cases)


def stopped(settings) -> str:
    """The message of the run, which must stop at its fourth step and leave only finite numbers."""
    with pytest.raises(TrainingStopped) as error:
        survival.train_small(settings)
    found = newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).checkpoint
    assert found.step == 2
    tensors = [*found.model.values(), *(t for state in found.optimizer["state"].values() for t in state.values())]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    lines = read_metrics(settings.logs / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    json.dumps(lines, allow_nan=False)
    assert error.value.exit_status == 3
    return str(error.value)


def at_fourth_step(monkeypatch, strike):
    """Call `strike(run)` before the fourth step."""
    take_step = loop.take_step

    def struck(run):
        if run.step == 3:
            before = {name: value.clone() for name, value in run.model.state_dict().items()}
            strike(run)
            changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
            try:
                return take_step(run)
            finally:
                for name, value in run.model.state_dict().items():
                    assert name in changed or torch.equal(value, before[name])  # no update was made
        return take_step(run)

    monkeypatch.setattr(loop, "take_step", struck)


@bad("name", ["embedding.weight", "head.bias_V", "backbone.norm.weight"], infinite=["embedding.weight"])
def test_weights(world, tmp_path, monkeypatch, name, value):
    def strike(run):
        with torch.no_grad():
            run.model.get_parameter(name).view(-1)[5] = -value

    at_fourth_step(monkeypatch, strike)
    assert stopped(survival.small_run(world, tmp_path)).startswith("step 4: 1 weights are not finite")


@bad("part", ["probs_NK", "entropy_N", "confidence_N"], infinite=["entropy_N"])
def test_signals(world, tmp_path, monkeypatch, part, value):
    settings = survival.small_run(world, tmp_path)
    batch = SignalStore.batch
    dataset = open_dataset("--data", world.data)
    rows = rows_of_step(dataset.train.num_rows, 30, settings.seed, 3)
    guilty = int(rows[11])
    place = int(dataset.train.row_token_offsets[guilty]) + 2

    def poisoned(self, split, index_N):
        signals = batch(self, split, index_N)
        getattr(signals, part)[torch.from_numpy(np.flatnonzero(index_N == place))] = value
        return signals

    at_fourth_step(monkeypatch, lambda run: monkeypatch.setattr(SignalStore, "batch", poisoned))
    assert stopped(settings).startswith(f"step 4: the teacher's signals of rows [{guilty}] are not finite")


@bad("where", ["loss", "gradient"], infinite=["loss", "gradient"])
def test_loss_and_gradients(world, tmp_path, monkeypatch, where, value):
    settings = survival.small_run(world, tmp_path)
    num_rows = open_dataset("--data", world.data).train.num_rows
    guilty = sorted(rows_of_step(num_rows, 30, settings.seed, 3).tolist())[:2]
    split = open_dataset("--data", world.data).train
    marks = {tuple(split.batch(np.array([row])).input_ids[0]) for row in guilty}

    def strike(run):
        hidden_states = run.model.hidden_states

        def poisoned(input_ids_BT, **others):
            states = hidden_states(input_ids_BT=input_ids_BT, **others)
            mask = torch.tensor([tuple(row.tolist()) in marks for row in input_ids_BT])
            if mask.any():
                if where == "loss":
                    return torch.where(mask[:, None, None], states * value, states)
                states.register_hook(lambda gradient: torch.where(mask[:, None, None], gradient * value, gradient))
            return states

        monkeypatch.setattr(run.model, "hidden_states", poisoned)

    at_fourth_step(monkeypatch, strike)
    message = stopped(settings)
    assert message.startswith("step 4: loss ")
    named = json.loads(message[message.index("[") : message.index("]") + 1])
    assert sorted(named) == guilty


def test_rows_of_a_stage_with_sources_are_said_to_be_theirs(world, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("stages: [{name: a, fraction: 1.0, sources: [alpaca]}]")
    settings = survival.small_run(world, tmp_path, strategy=str(tmp_path / "own.yaml"))

    def strike(run):
        hidden_states = run.model.hidden_states
        monkeypatch.setattr(run.model, "hidden_states", lambda **inputs: hidden_states(**inputs) * torch.nan)

    at_fourth_step(monkeypatch, strike)
    assert " (rows of alpaca alone)" in stopped(settings)


def test_a_state_that_is_not_finite_is_never_saved(world, tmp_path, monkeypatch):
    take_step, settings = loop.take_step, survival.small_run(world, tmp_path)

    def poisoned(run):
        metrics = take_step(run)
        if run.step == 4:
            run.optimizer.state[run.model.embedding.weight]["exp_avg_sq"][0, 0] = float("inf")
        return metrics

    monkeypatch.setattr(loop, "take_step", poisoned)
    with pytest.raises(TrainingStopped, match=r"step 4: optimiser state 0\.exp_avg_sq is not finite"):
        survival.train_small(settings)
    assert newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).checkpoint.step == 2


def test_the_exit_status_is_3(world, tmp_path, monkeypatch, capsys):
    def strike(run):
        with torch.no_grad():
            run.model.head.bias_V[3] = float("nan")

    at_fourth_step(monkeypatch, strike)
    assert cli.run_guarded(lambda: survival.train_small(survival.small_run(world, tmp_path))) == 3
    error = capsys.readouterr().err
    assert error.startswith("indra: error: step 4: 1 weights are not finite")
    assert error.count("\n") == 1


# What torch raises on CUDA, in main memory (the real text, see test_memory.py), and on MPS.
FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9 GB)."),
)


@pytest.mark.parametrize("error", FULL, ids=("cuda", "cpu", "mps"))
def test_a_step_that_does_not_fit_into_memory_is_one_line(world, tmp_path, monkeypatch, error):
    def full(engine, step):
        raise error

    monkeypatch.setattr(Engine, "step", full)
    with pytest.raises(OutOfMemory, match=r"--micro-batch-tokens: got 768; must be smaller, .* memory of cpu"):
        loop.train(survival.small_run(world, tmp_path))


def test_an_evaluation_that_does_not_fit_into_memory_names_no_option_of_the_step(world, tmp_path, monkeypatch):
    def full(*_):
        raise FULL[0]

    monkeypatch.setattr(held_out, "losses_of", full)
    with pytest.raises(OutOfMemory, match=r"^--device: got cpu; must have free memory for an evaluation"):
        loop.train(survival.small_run(world, tmp_path))


def test_other_errors_of_a_step_are_no_lack_of_memory(world, tmp_path, monkeypatch):
    def broken(engine, step):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "step", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        loop.train(survival.small_run(world, tmp_path))
