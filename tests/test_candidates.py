"""Sampled softmax: which tokens a step compares, and that its loss and gradients are those of the weighted sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import forked
from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE
from indraquantum.teacher.signals import open_signals
from indraquantum.training import candidates as module
from indraquantum.training import loop
from indraquantum.training import run as runs
from indraquantum.training.candidates import CandidateSampler
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.engine import Engine, _work
from indraquantum.training.parallel import SingleProcess, WeightAverage, make_parallel
from indraquantum.training.plan import plan_run
from indraquantum.training.resume import resume
from indraquantum.training.run import softmax_of, trial_run
from indraquantum.training.step import StepInput

V = 640
COUNTS = np.arange(V)[::-1] % 601  # some tokens never occur, and some equally often
NAMED = np.array([[3, -100, 7], [V - 1, 3, -1]])


def test_frequent_and_named_tokens_stand_for_themselves_and_drawn_ones_for_the_rest():
    found = CandidateSampler(COUNTS).of_step(5, [NAMED])
    ids, weights = found.ids_R.numpy(), found.log_weight_R.exp().numpy()
    frequent = set(np.argsort(-COUNTS, kind="stable")[: V // 4].tolist())
    exact = frequent | {3, 7, V - 1}
    assert set(ids[weights == 1].tolist()) == exact
    drawn = set(ids.tolist()) - exact
    assert V // 32 <= len(drawn) < 2 * (V // 32)
    assert weights[weights != 1] == pytest.approx((V - len(exact)) / len(drawn))
    assert weights.sum() == pytest.approx(V)
    assert (np.diff(ids) > 0).all()
    assert found.ids_R[found.places(found.ids_R)].equal(found.ids_R)
    assert found.places(torch.tensor([-100, 3, -1])).tolist() == [-100, ids.tolist().index(3), -1]


def test_steps_have_few_different_sizes():
    """Matrices of ever new sizes would fill oneDNN's cache of code, and the allocator could not reuse freed memory."""
    sampler, draw = CandidateSampler(COUNTS), np.random.default_rng(0)
    found = [sampler.of_step(seed, [draw.integers(0, V, 30)]).ids_R for seed in range(50)]
    assert len({len(ids_R) for ids_R in found}) <= 3
    assert all(len(ids_R) % (V // 32) == 0 for ids_R in found)
    for others in (5, 0):  # fewer than there are to draw
        everything = sampler.of_step(0, [np.arange(V - others)])
        assert everything.ids_R.tolist() == list(range(V))
        assert everything.log_weight_R.tolist() == [0.0] * V


def test_the_seed_and_the_named_tokens_decide():
    sampler = CandidateSampler(COUNTS)
    ids = [sampler.of_step(seed, [NAMED]).ids_R.tolist() for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    assert sampler.of_step(1, []).ids_R.tolist() != ids[0]


def test_the_sum_over_the_candidates_is_unbiased():
    logits_V = torch.randn(V, generator=torch.Generator().manual_seed(1)).double()
    sampler, whole = CandidateSampler(COUNTS), logits_V.exp().sum().item()
    found = [sampler.of_step(seed, [NAMED]) for seed in range(400)]
    sums = np.array([(logits_V[one.ids_R] + one.log_weight_R).exp().sum().item() for one in found])
    assert abs(sums.mean() - whole) < 3 * sums.std() / math.sqrt(len(sums))
    assert sums.std() < 0.2 * whole  # it does vary, and not by much
    assert sums.std() > 0.01 * whole


def parts(world):
    """A small model, its data, and a sampler of few of its tokens."""
    dataset = open_dataset("--data", world.data)
    size = dataset.tokenizer.vocabulary_size
    torch.manual_seed(0)
    sizes = {"d_model": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10}
    model = IndraQuantumPhase2(IndraQuantumConfig(vocab_size=size, **sizes)).train()
    return model, dataset, CandidateSampler(np.bincount(dataset.train.tokens, minlength=size))


@pytest.mark.parametrize("all_drawn", [False, True])
def test_loss_and_gradients_are_those_of_the_weighted_softmax(world, monkeypatch, all_drawn):
    if all_drawn:  # every token is a candidate, so this is the exact objective
        monkeypatch.setattr(module, "DRAWN", 1.0)
    model, dataset, sampler = parts(world)
    batch, store = dataset.train.batch(np.arange(4)), open_signals("--signals", world.signals, dataset)
    signals, count = store.batch("train", batch.index[batch.labelled]), int(batch.labelled.sum())
    chosen = sampler.of_step(3, [batch.labels, signals.ids_NK.numpy()])
    assert (len(chosen.ids_R) == model.config.vocab_size) is all_drawn
    objective = SemanticDistillationLoss(0.7, 0.2, 0.3)
    parallel = SingleProcess(model)
    terms = parallel.run_pass(batch, signals, objective, count, candidates=chosen).terms
    terms.total.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = plain_loss(model, batch, signals, chosen)
    expected.backward()
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def plain_loss(model, batch, signals: TeacherSignals, chosen):
    """Cross-entropy, distillation and alignment from whole logits, in which the other tokens are left out."""
    ids, segments, positions = map(torch.from_numpy, (batch.input_ids, batch.segments, batch.positions))
    labelled = torch.from_numpy(batch.labelled)
    states = model.hidden_states(ids, positions, segments)[labelled]
    weights_V = torch.full((model.config.vocab_size,), -torch.inf)
    weights_V[chosen.ids_R] = chosen.log_weight_R
    log_p = torch.log_softmax(model.logits(states, model.lift_table()) + weights_V, dim=1)
    ce = F.nll_loss(log_p, torch.from_numpy(batch.labels)[labelled])
    q = torch.zeros_like(log_p).scatter_add_(
        1, signals.ids_NK.long().clamp(min=0), signals.probs_NK.masked_fill(signals.ids_NK < 0, 0.0)
    )
    kd = (torch.xlogy(q, q) - q * log_p.masked_fill(q == 0, 0.0)).sum() / len(q)
    c = model.amplitude(states)
    target = torch.pi * signals.entropy_N / math.log(model.config.vocab_size)
    phase = (1 - (c.real * target.cos() + c.imag * target.sin()) / (c.abs() ** 2 + 1e-6).sqrt()).mean()
    magnitude = (c.abs() - signals.confidence_N).square().mean()
    return ce + 0.7 * kd + 0.2 * phase + 0.3 * magnitude


ROWS = np.arange(7)


def some_steps(world, processes, kind, micro_batch_rows=2, taught=False):
    model, dataset, sampler = parts(world)
    signals = open_signals("--signals", world.signals, dataset) if taught else None
    weights = {"signals": signals, "kd_weight": 0.5, "phase_weight": 0.1} if taught else {}
    parallel = make_parallel(kind, model, processes, torch.device("cpu"), unused=True)
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3, 10.0, 0.1))
    engine = Engine(parallel, optimizer, sampler=sampler)
    fixed = {"learning_rate": 3e-3, "table_rate": 10.0, **weights}
    steps = [StepInput(dataset.train, ROWS, micro_batch_rows, seed=seed, **fixed) for seed in range(12)]
    terms = [engine.step(step).terms for step in steps]
    return terms, parallel.whole_state(optimizer, WeightAverage(model, 0.0)).model


def test_micro_batches_compare_the_same_tokens(world):
    (whole, weights), (pieces, summed) = (some_steps(world, ALONE, "auto", rows) for rows in (7, 2))
    assert whole[-1]["ce"] < whole[0]["ce"] - 0.3
    for one, several in zip(whole, pieces, strict=True):
        assert several == pytest.approx(one, abs=1e-4)
    torch.testing.assert_close(summed, weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "taught"), [("ddp", True), ("fsdp2", False)])
def test_several_processes_compare_the_same_tokens(world, tmp_path, kind, taught):
    terms, weights = some_steps(world, ALONE, "auto", taught=taught)
    found = forked.values(2, lambda processes: some_steps(world, processes, kind, taught=taught), tmp_path)
    for rank, (others, their_weights) in enumerate(found):
        for one, several in zip(terms, others, strict=True):
            assert several == pytest.approx(one, abs=1e-4)
        if kind == "ddp" or rank == 0:
            torch.testing.assert_close(their_weights, weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "is_sampled"),
    [({}, True), ({"temperature": 2.0}, False), ({"tail": "uniform"}, False), ({"tail": "bucket"}, True)],
)
def test_what_needs_all_tokens_compares_all(world, changes, is_sampled):
    model, dataset, sampler = parts(world)
    engine = Engine(SingleProcess(model), torch.optim.SGD(model.parameters(), 0.1), sampler=sampler)
    signals = open_signals("--signals", world.signals, dataset)
    step = StepInput(dataset.train, ROWS, 7, 3e-3, signals=signals, kd_weight=0.1, **changes)
    work = [_work(step, ROWS)]
    assert (engine._candidates(step, work) is not None) is is_sampled
    named = np.concatenate([work[0].batch.labels.ravel(), work[0].teacher.ids_NK.numpy().ravel()])
    assert engine.compared(step) == (len(sampler.of_step(7, [named]).ids_R) if is_sampled else None)
    assert Engine(SingleProcess(model), engine.optimizer)._candidates(step, work) is None


def test_auto_samples_where_it_was_measured(world, monkeypatch):
    dataset = open_dataset("--data", world.data)

    def chosen(**options):
        given = TrainSettings(**{"data": world.data, "softmax": "auto", **options})
        return softmax_of(given, plan_run(given, dataset))

    assert chosen(no_teacher=True) == "exact"  # a small vocabulary
    monkeypatch.setattr(runs, "LARGE_VOCABULARY", dataset.tokenizer.vocabulary_size)
    assert chosen(no_teacher=True) == "sampled"
    assert chosen(no_teacher=True, head="born") == "exact"
    assert chosen() == "sampled"  # with a teacher, too
    assert chosen(softmax="sampled") == "sampled"
    assert chosen(no_teacher=True, softmax="exact") == "exact"


def test_a_resumed_run_keeps_its_softmax(world, tmp_path, monkeypatch):
    small = {"d_model": 8, "layers": 1, "heads": 1, "mlp_width": 16, "batch_tokens": 480, "no_teacher": True}
    folders = {"data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs"}
    given = TrainSettings(**small, **folders, softmax="auto", max_steps=4)
    monkeypatch.setattr(runs, "LARGE_VOCABULARY", 1)
    path = loop.train(given).checkpoint
    checkpoint = load_checkpoint("", path)
    assert checkpoint.settings["softmax"] == "sampled"
    monkeypatch.setattr(runs, "LARGE_VOCABULARY", 10**9)  # now auto means exact
    run = trial_run(given)
    assert run.engine.sampler is None
    assert resume(run)
    assert run.engine.sampler is not None
    del checkpoint.settings["softmax"]  # as in a run of before
    save_checkpoint(path, checkpoint)
    monkeypatch.setattr(runs, "LARGE_VOCABULARY", 1)
    run = trial_run(given)
    assert run.engine.sampler is not None
    assert resume(run)
    assert (run.engine.sampler, run.identity["softmax"]) == (None, "exact")


def test_a_run_resumes_to_the_bit_and_only_with_the_same_softmax(world, tmp_path):
    small = {"d_model": 8, "layers": 1, "heads": 1, "mlp_width": 16, "batch_tokens": 480, "kd_weight_end": 0.3}

    def run(name, **changes):
        folders = {"data": world.data, "signals": world.signals, "output": tmp_path / name, "logs": tmp_path / "logs"}
        return TrainSettings(**{**small, **folders, "softmax": "sampled", "save_every": 3, "max_steps": 6, **changes})

    whole = loop.train(run("whole"))
    loop.train(run("stopped"))
    for path in (tmp_path / "stopped").glob("checkpoint_v4_epoch_*"):
        path.unlink()
    resumed = loop.train(run("stopped"))
    first, second = (load_checkpoint("", report.checkpoint).model for report in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    exact = load_checkpoint("", loop.train(run("exact", softmax="exact")).checkpoint).model
    assert not torch.equal(exact["embedding.weight"], first["embedding.weight"])
    with pytest.raises(UserError, match="--softmax"):
        loop.train(run("stopped", softmax="exact"))
