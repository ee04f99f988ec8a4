"""The rules of CUDA and MPS, enforced on the CPU: operators that exist there, and what torch refuses there."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchgen
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from indraquantum.ablation.one_run import peak_memory
from indraquantum.config import TestSettings, TrainSettings
from indraquantum.data.split import Batch
from indraquantum.inference import generate
from indraquantum.kernels import dispatch, fused_linear_objective, onednn
from indraquantum.kernels.cuda import Bfloat16Products, cuda_objective
from indraquantum.loss_v2 import TeacherSignals
from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2
from indraquantum.processes import ALONE, Processes, joined_processes
from indraquantum.training import optimizers, parallel, samples
from indraquantum.training import run as runs
from indraquantum.training.candidates import CandidateSampler
from indraquantum.training.engine import Engine, clip_gradients
from indraquantum.training.parallel import FullyShardedParallel, Precision, SingleProcess, make_parallel
from indraquantum.training.step import StepInput
from indraquantum.trials.costs import StepSize, objective_bytes
from small_model import V, make

CUDA, MPS = torch.device("cuda"), torch.device("mps")
EVERYWHERE = {"MPS", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd"}


@functools.cache
def operators() -> dict[str, str]:
    """What torch's own list says of each operator, by its name."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = text.split("\n- func: ")[1:]
    return {entry[: entry.index("(")]: entry for entry in entries}


def exists_on_mps(name: str) -> bool:
    """Return whether the operator has a kernel for MPS, its own or one for all devices."""
    entry = operators()[name]
    if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE):
        return exists_on_mps(delegate[1])
    table = re.search(r"^  dispatch:\n((?:    .*\n?)+)", entry, re.MULTILINE)
    if table is None:  # composed of others
        return True
    keys = {key.strip() for line in table[1].splitlines() for key in line.partition(":")[0].split(",")}
    return bool(keys & EVERYWHERE)


class RulesOfMPS(TorchDispatchMode):
    """Collects the operators inside that MPS lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.missing = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        name += f".{function._schema.overload_name}" if function._schema.overload_name else ""
        self.seen.append(name)
        # torch chooses attention by the device; an operator `..._for_cpu` has its counterpart elsewhere.
        if namespace == "aten" and "_for_cpu" not in name and not exists_on_mps(name):
            self.missing.add(name)
        return function(*args, **(kwargs or {}))


class Rows:
    """Rows of random tokens, and a teacher whose signals lack a fifth of the probability."""

    def batch(self, rows, index_N=None):
        draw = np.random.default_rng(0)
        if index_N is not None:
            ids_NK = torch.from_numpy(draw.integers(0, V, (len(index_N), 4)))
            entropy_N, confidence_N = (torch.full((len(index_N),), value) for value in (1.5, 0.4))
            return TeacherSignals(ids_NK, torch.full(ids_NK.shape, 0.2), entropy_N, confidence_N)
        ids_BT = draw.integers(0, V, (len(rows), 6))
        labels_BT = np.where(np.arange(6) < 5, np.roll(ids_BT, -1, axis=1), -100)
        positions_BT = np.broadcast_to(np.arange(6), ids_BT.shape).copy()
        zeros_BT = np.zeros_like(ids_BT)
        return Batch(ids_BT, labels_BT, positions_BT, zeros_BT, zeros_BT, rows[:, None] * 6 + positions_BT)


def a_step(**changes):
    weights = {"kd_weight": 0.5, "phase_weight": 0.1, "magnitude_weight": 0.1}
    return StepInput(Rows(), np.arange(5), 3, 1e-3, signals=Rows(), **{**weights, **changes})


def engine_of(model, dtype=torch.float32, sampled=False):
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 10.0, 0.0), fused=True)
    sampler = CandidateSampler(np.arange(V)) if sampled else None
    return Engine(SingleProcess(model, precision=Precision(dtype)), optimizer, sampler=sampler)


@pytest.mark.parametrize("scale", [1.0, 1e4])  # with the latter, logits may be too large for exp
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"dtype": torch.bfloat16, "sampled": True}, {}),
        ({}, {"temperature": 2.0, "tail": "bucket"}),
        ({}, {"tail": "uniform"}),
    ],
    ids=["plain", "bfloat16 sampled", "warm bucket", "uniform"],
)
def test_a_step_uses_only_operators_that_mps_has(monkeypatch, scale, options, changes):
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "cpu", cuda_objective)
    model = make(num_hidden_layers=1).train()
    with torch.no_grad():
        model.head.scale_1.mul_(scale)
    engine = engine_of(model, **options)
    with RulesOfMPS() as rules:
        engine.step(a_step(**changes))
    assert {"exp_", "index_put_", "_fused_adamw_"} <= set(rules.seen)
    assert not rules.missing


def test_the_list_of_operators_is_understood():
    assert {name: exists_on_mps(name) for name in ("take", "index.Tensor", "mm", "exp_", "mm.dtype", "matmul")} == {
        "take": False, "index.Tensor": True, "mm": True, "exp_": True, "mm.dtype": False, "matmul": True,
    }  # fmt: skip


def test_gradients_are_clipped_where_lists_of_tensors_have_no_operators(monkeypatch):
    for module in (torch.nn.utils.clip_grad, torch.utils._foreach_utils):
        monkeypatch.setattr(module, "_device_has_foreach_support", lambda device: False)
    weights = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    weights[0].grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(torch.optim.SGD(weights), 1.0) == 5.0
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6, 0.8]))


# --- CUDA


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_steps_on_cuda_and_nothing_else_are_deterministic(monkeypatch, before):
    seen = []

    def look(self, step):
        seen.append((
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision(),
        ))  # fmt: skip
        raise KeyError

    monkeypatch.setattr(Engine, "_step", look)
    monkeypatch.setattr(onednn, "is_exact", lambda: True)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with pytest.raises(KeyError):
            Engine(SimpleNamespace(device=CUDA), None).step(None)
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (after, torch.utils.deterministic.fill_uninitialized_memory) == (before, True)
    assert seen == [(True, False, False, "highest")]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_onednns_setting_is_for_the_cpu(monkeypatch):
    monkeypatch.setattr(onednn, "is_exact", lambda: True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    for device, inside in ((torch.device("cpu"), "bf16"), (CUDA, before), (MPS, before)):
        with onednn.onednn_products(device):
            assert torch.backends.mkldnn.matmul.fp32_precision == inside
    with Bfloat16Products().setting(CUDA):
        assert torch.get_float32_matmul_precision() == "highest"


def test_products_on_cuda_need_no_second_buffer():
    with FakeTensorMode(), RulesOfMPS() as rules:
        left, right, out = (torch.empty(shape, device="cuda") for shape in ((7, 3), (3, 5), (7, 5)))
        Bfloat16Products().into(out, left.bfloat16(), right.bfloat16())
    assert rules.seen[-1] == "mm.dtype_out"
    assert "copy_" not in rules.seen


def test_a_chunks_gradient_is_rounded_once():
    states, table = torch.randn(19, 13).bfloat16().requires_grad_(), torch.randn(53, 13).requires_grad_()
    rounded = []

    class Rounded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and found.dtype is torch.bfloat16:
                rounded.append(found.numel())
            return found

    with Rounded():
        fused_linear_objective(states, table, torch.arange(19), implementation="cuda")
    assert rounded.count(53 * 19) == 1


@pytest.mark.parametrize("native", [True, False])
def test_muon_uses_bfloat16_on_cuda_only_if_it_is_native(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert optimizers.turning_format("cuda") is (torch.bfloat16 if native else torch.float32)
    assert optimizers.turning_format("mps") is torch.float32


def test_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory(CUDA) == 7
    assert peak_memory(torch.device("cpu")) != 7
    model = make()
    on_cpu, on_cuda = (objective_bytes(model, StepSize(2, 6, 10), device) for device in (torch.device("cpu"), CUDA))
    assert (on_cpu, on_cuda) == (10 * V * 4, 10 * V * 6)  # a copy in bfloat16


# --- several processes


class Stop(Exception):
    """Ends what a test looks at."""


def test_fsdp2_begins_on_the_cpu(monkeypatch):
    def refuse(*_):
        raise AssertionError("the whole model is moved")

    def stop(kind, model, *_, **__):
        assert next(model.parameters()).device.type == "cpu"
        raise Stop

    config = IndraQuantumConfig(vocab_size=V, d_model=6, num_attention_heads=1, num_hidden_layers=1)
    monkeypatch.setattr(runs, "starting_weights", lambda *_: None)
    monkeypatch.setattr(runs, "model_config", lambda *_: config)
    monkeypatch.setattr(IndraQuantumPhase2, "to", refuse)
    monkeypatch.setattr(runs, "make_parallel", stop)
    settings, plan = TrainSettings(parallel="fsdp2"), SimpleNamespace(stages=())
    with pytest.raises(Stop):
        runs.start_run(settings, plan, torch.device("cpu"), Processes(0, 2), counts_text=False)


@pytest.mark.parametrize(
    ("kind", "processes", "moved"),
    [("auto", ALONE, True), ("fsdp2", ALONE, True), ("ddp", Processes(0, 2), True), ("fsdp2", Processes(0, 2), False)],
)
def test_only_fsdp2_moves_a_model_layer_by_layer(monkeypatch, kind, processes, moved):
    model, seen = make(), []
    monkeypatch.setattr(IndraQuantumPhase2, "to", lambda self, device: seen.append(device) or self)
    for name in ("DataParallel", "FullyShardedParallel"):
        monkeypatch.setattr(parallel, name, lambda *_, **__: None)
    make_parallel(kind, model, processes, CUDA, unused=False)
    assert seen == ([CUDA] if moved else [])


def test_a_sharded_model_is_on_its_device(monkeypatch):
    """Also if its weights were read from the first parameter before they were moved."""
    meshes = []
    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", lambda *mesh: meshes.append(mesh))
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", lambda module, mesh: None)
    monkeypatch.setattr(torch.distributed.fsdp, "register_fsdp_forward_method", lambda *_: None)
    monkeypatch.setattr(parallel.MicroBatchPass, "reshard", lambda self: None, raising=False)
    sharded = FullyShardedParallel(make(), Processes(0, 2), Precision(), CUDA)
    assert (sharded.device, meshes) == (CUDA, [("cuda", (2,))])


def test_processes_of_one_machine_are_not_reachable_from_others(monkeypatch):
    def stop(*_, **__):
        raise Stop

    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(torch.distributed, "rendezvous", stop)
    with pytest.raises(Stop), joined_processes():
        pass
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "lo")


# --- random numbers


@pytest.mark.parametrize("writes", ["text", "samples"])
def test_what_is_written_leaves_the_random_state_of_mps(monkeypatch, writes):
    restored = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: restored.append((state, device)))
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *values, **_: tensor(*values))

    def stop(*_, **__):
        raise Stop

    tokenizer = SimpleNamespace(encode_prompt=lambda prompt: [3, 5], eos_id=2)
    config = SimpleNamespace(max_position_embeddings=99)
    model = SimpleNamespace(device=MPS, config=config, training=True, eval=stop)
    monkeypatch.setattr(generate, "prompt_ids", lambda *_: [3, 5])
    monkeypatch.setattr(generate, "_continued", stop)
    average = SimpleNamespace(in_place_of=lambda model: contextlib.nullcontext())
    settings = SimpleNamespace(compile=False)
    run = SimpleNamespace(
        dataset=SimpleNamespace(tokenizer=tokenizer), model=model, device=MPS, average=average, settings=settings
    )
    before = torch.get_rng_state()
    write = {
        "text": lambda: generate.generate_text(model, tokenizer, TestSettings(prompt="x", max_new_tokens=4), "x"),
        "samples": lambda: samples.sample(run, "x"),
    }
    with pytest.raises(Stop):
        write[writes]()
    assert restored == [("before", MPS)]
    assert torch.equal(torch.get_rng_state(), before)
