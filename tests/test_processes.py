"""What processes agree on: sums, errors, who writes. And the optimiser step that they share."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import pytest
import torch

import forked
from indraquantum import cli
from indraquantum import processes as processes_module
from indraquantum.config import CaptureSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import TrainingStopped, UserError
from indraquantum.interrupts import Interrupted
from indraquantum.launched import launched_processes
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE, Processes, joined_processes, own_device, store_of_this_start
from indraquantum.teacher.capture import capture
from indraquantum.teacher.signals import open_signals
from indraquantum.training.engine import Engine
from indraquantum.training.parallel import WeightAverage, make_parallel
from indraquantum.training.step import StepInput


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_the_whole_in_order(world):
    rows = np.array([5, 3, 11, 2, 7])
    shares = [Processes(rank, world).share(rows) for rank in range(world)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sums_largest_and_gather(tmp_path):
    def act(processes):
        rank = processes.rank
        return (
            processes.sums([rank + 0.5, float("nan") if rank == 2 else 1.0]),
            processes.largest(10 - rank),
            processes.gather(f"r{rank}"),
            processes.first(lambda: f"from {rank}"),
            processes.is_first,
        )

    found = forked.values(3, act, tmp_path)
    for rank, (sums, largest, everyone, first, is_first) in enumerate(found):
        assert sums[0] == 4.5
        assert np.isnan(sums[1])
        assert (largest, everyone, first) == (10, ["r0", "r1", "r2"], "from 0")
        assert is_first == (rank == 0)
    assert (ALONE.sums([2.5]), ALONE.largest(3), ALONE.gather(1), ALONE.first(lambda: 4)) == ([2.5], 3, [1], 4)


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(("error", "status"), [(UserError("--x", 1, "must be 2"), 2), (TrainingStopped("NaN"), 3)])
def test_an_error_of_one_is_every_ones_and_said_once(tmp_path, guilty, error, status):
    def act(rank):
        with forked.joined_processes() as processes, processes.together():
            if rank == guilty:
                raise error

    assert forked.run(2, act, tmp_path) == [status, status]
    assert forked.said(tmp_path).count("indra: error") == 1


def test_an_error_of_one_process_alone_is_said_by_that_one(tmp_path):
    """Only what all processes have is left to the first one."""

    def act(rank):
        with forked.joined_processes() as processes:
            if rank == 1:
                raise UserError("--x", rank, "must be 2")
            processes.sums([1.0])  # waits for the other, which does not come

    assert forked.run(2, act, tmp_path) == [1, 2]
    assert forked.said_by(tmp_path / "said.1") == "indra: error: --x: got 1; must be 2\n"


def test_an_error_of_the_first_reaches_those_who_wait(tmp_path):
    def act(rank):
        def refuse():
            raise UserError("--x", rank, "must be 2")

        with forked.joined_processes() as processes:
            processes.first(refuse)

    assert forked.run(2, act, tmp_path) == [2, 2]
    assert forked.said(tmp_path).strip() == "indra: error: --x: got 0; must be 2"


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UserError, match="--device"):
        own_device(torch.device("mps"))
    with pytest.raises(UserError, match=r"--nproc-per-node.*at most 0"):
        own_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)


def test_a_world_size_without_a_rank_means_one_process_everywhere(monkeypatch):
    """A batch system may set it for all its jobs. Only torchrun gives a rank too."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched_processes() == 1
    assert own_device(torch.device("cuda")) == torch.device("cuda")
    cli.require_one_process()
    with joined_processes() as processes:
        assert processes.alone
    monkeypatch.setenv("RANK", "1")
    assert launched_processes() == 2
    with pytest.raises(UserError, match="torchrun: got 2 processes"):
        cli.require_one_process()


# Rows of the steps: several micro-batches, shares of different sizes, and fewer rows than processes.
STEPS = (np.arange(11), np.array([14]), np.arange(20, 26), np.array([3, 1]))


def fifty_steps(world_of_tests, processes, kind, teacher, folder):
    """Losses, norms and readouts of 50 steps, and the weights and optimiser state that they end in."""
    dataset = open_dataset("--data", world_of_tests.data)
    config = IndraQuantumConfig(
        vocab_size=dataset.tokenizer.vocabulary_size, d_model=6, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=10, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = IndraQuantumPhase2(config).train()
    parallel = make_parallel(kind, model, processes, torch.device("cpu"), unused=teacher is None)
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3, 10.0, 0.1), fused=True)
    signals = None if teacher is None else open_signals("--signals", folder, dataset)
    taught = {} if teacher is None else {
        "signals": signals, "kd_weight": 0.3, "phase_weight": 0.2, "magnitude_weight": 0.1, "tail": "bucket",
    }  # fmt: skip
    steps = [StepInput(dataset.train, rows, 3, learning_rate=3e-3, table_rate=10.0, **taught) for rows in STEPS]
    engine = Engine(parallel, optimizer)
    results = [engine.step(steps[number % len(steps)]) for number in range(50)]
    state = parallel.whole_state(optimizer, WeightAverage(model, 0.0))
    return results, state.model, state.optimizer


@pytest.mark.parametrize(
    ("kind", "ranks", "teacher"),
    [
        ("ddp", 2, "topk"),  # most of the probability is in the tail's bucket
        ("fsdp2", 3, None),
        pytest.param("ddp", 3, None, marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, "topk", marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_are_those_of_one_process(world, tmp_path, kind, ranks, teacher):
    signals = world.signals
    if teacher == "topk":
        signals = tmp_path / "topk"
        capture(CaptureSettings(data=world.data, teacher=str(world.teacher), output=signals, kind="topk", top_k=2))
    results, weights, state = fifty_steps(world, ALONE, "auto", teacher, signals)
    assert results[0].terms["ce"] - results[48].terms["ce"] > 0.5
    found = forked.values(ranks, lambda processes: fifty_steps(world, processes, kind, teacher, signals), tmp_path)
    for rank, (others, their_weights, their_state) in enumerate(found):
        for one, several in zip(results, others, strict=True):
            assert several.tokens == one.tokens
            assert several.terms == pytest.approx(one.terms, abs=1e-4, nan_ok=teacher == "topk")  # no estimate
            assert several.readout == pytest.approx(one.readout, abs=1e-3)
            assert several.grad_norm == pytest.approx(one.grad_norm, rel=1e-2)
        if kind == "fsdp2" and rank:  # gathered for the one that writes
            assert (their_weights, their_state) == ({}, {})
            continue
        torch.testing.assert_close(their_weights, weights, rtol=1e-3, atol=1e-3)
        assert their_state["param_groups"] == state["param_groups"]
        assert their_state["state"].keys() == state["state"].keys()
        for number, entry in state["state"].items():
            for name, value in entry.items():  # the squares are so small that only a relative error can tell them
                error = (their_state["state"][number][name] - value).norm()
                assert error <= 1e-2 * value.norm(), (number, name)


def test_a_restart_on_one_machine_finds_nothing_of_the_start_before(monkeypatch):
    """torchrun's agent keeps one store over all its restarts; addresses of the dead stand in it."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    assert store_of_this_start() is None  # no agent: nothing to keep apart
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    starts = []
    for restarts in ("0", "1", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        starts.append(store_of_this_start())
    first, second, peer = starts
    first.set("address", "of the dead")
    assert not second.check(["address"])
    second.set("address", "of the living")
    assert peer.get("address") == b"of the living"


@pytest.mark.parametrize("agent", [True, False])  # as torchrun starts them, or another program
def test_a_program_may_train_twice_in_the_same_processes(tmp_path, agent):
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def act(rank):
        if agent:
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            os.environ["MASTER_PORT"] = str(server.port)
        for run in range(3):
            time.sleep(0.5 if run and not rank else 0.0)  # the first process writes files, and comes last
            with joined_processes() as found:
                assert found.sums([1.0]) == [2.0]

    assert forked.run(2, act, tmp_path) == [0, 0], forked.said(tmp_path)


def test_all_processes_raise_a_shared_error_and_the_first_tells_it(tmp_path):
    def fail():
        raise UserError("--data", "x", "must be there")

    def act(rank):
        def trains():
            with joined_processes() as found:
                found.first(fail)

        with pytest.raises(UserError, match="must be there"):
            trains()
        (tmp_path / f"caught.{rank}").touch()
        trains()

    assert forked.run(2, act, tmp_path) == [2, 2], forked.said(tmp_path)
    assert {path.name for path in tmp_path.glob("caught.*")} == {"caught.0", "caught.1"}
    assert forked.said(tmp_path).count("indra: error: --data: got x; must be there") == 1


@pytest.mark.parametrize(
    ("error", "agreed", "waits"),
    [
        (None, False, True),
        (Interrupted(15), False, True),
        (UserError("--data", "x", "must be there"), True, True),
        (UserError("--micro-batch-tokens", 1, "must be smaller"), False, False),
        (RuntimeError("of this process alone"), False, False),
    ],
)
def test_a_process_that_fails_alone_on_a_gpu_does_not_wait_for_the_others(monkeypatch, error, agreed, waits):
    """NCCL ends a group only when all have left it, but the others are waiting for this process."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = []
    monkeypatch.setattr(processes_module, "_store", lambda one_machine: torch.distributed.HashStore())
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name, **__: done.append(name))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with contextlib.suppress(UserError, RuntimeError, Interrupted), joined_processes() as processes:
        processes.agreed = agreed
        if error is not None:
            raise error
    assert ("destroy_process_group" in done) == waits
