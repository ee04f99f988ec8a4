"""Tokens that no row holds share an embedding: the loss and its gradients are those of the whole vocabulary."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import forked
from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.loss_v2 import SemanticDistillationLoss
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE
from indraquantum.training import loop
from indraquantum.training.checkpoint import load_checkpoint
from indraquantum.training.engine import Engine
from indraquantum.training.parallel import SingleProcess, WeightAverage, make_parallel
from indraquantum.training.plan import plan_run
from indraquantum.training.step import StepInput
from indraquantum.training.unseen_tokens import UnseenTokens, unseen_tokens

ROWS = np.arange(5)


def parts(world, **changes):
    """A small model, the data, and the tokens that ROWS lack."""
    dataset = open_dataset("--data", world.data)
    sizes = {"d_model": 6, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 10}
    torch.manual_seed(0)
    model = IndraQuantumPhase2(IndraQuantumConfig(vocab_size=dataset.tokenizer.vocabulary_size, **sizes, **changes))
    batch = dataset.train.batch(ROWS)
    seen_V = np.zeros(model.config.vocab_size, dtype=bool)
    seen_V[batch.input_ids[batch.index >= 0]] = seen_V[batch.labels[batch.labelled]] = True
    assert 10 < np.count_nonzero(~seen_V) < 0.9 * len(seen_V)
    return model.train(), dataset, UnseenTokens.of(seen_V)


@pytest.mark.parametrize("changes", [{}, {"ends": "shared"}, {"projector": "none", "ends": "shared"}, {"bias": "none"}])
def test_loss_and_gradients_are_those_of_the_whole_vocabulary(world, changes):
    model, dataset, unseen = parts(world, **changes)
    alike = SingleProcess(model, unseen=unseen)
    batch = dataset.train.batch(ROWS)
    count = int(batch.labelled.sum())
    alike.run_pass(batch, None, SemanticDistillationLoss(0.0), count).terms.total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    ids, segments, positions = map(torch.from_numpy, (batch.input_ids, batch.segments, batch.positions))
    table = model.lift_table()
    logits = model.logits(model.hidden_states(ids, positions, segments), table)
    labels = torch.from_numpy(batch.labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    with torch.no_grad():
        loss = alike.run_pass(batch, None, SemanticDistillationLoss(0.0), count).terms.total
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    first, others = unseen.ids_U[0], unseen.ids_U[1:]
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.clone()
        if len(gradient) == model.config.vocab_size:  # the shared row moves for all of them
            gradient[first], gradient[others] = gradient[unseen.ids_U].sum(dim=0), 0.0
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def some_steps(world, processes, kind):
    model, dataset, unseen = parts(world)
    parallel = make_parallel(kind, model, processes, torch.device("cpu"), unused=True, unseen=unseen)
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3, 10.0, 0.1))
    engine, step = Engine(parallel, optimizer), StepInput(dataset.train, ROWS, 2, learning_rate=3e-3, table_rate=10.0)
    terms = [engine.step(step).terms for _ in range(12)]
    return terms, parallel.whole_state(optimizer, WeightAverage(model, 0.0)).model


def test_the_shared_row_is_whole_after_each_step_and_is_learned(world):
    terms, weights = some_steps(world, ALONE, "auto")
    model, _, unseen = parts(world)
    assert terms[-1]["ce"] < terms[0]["ce"] - 0.3
    for name in ("embedding.weight", "head.bias_V"):
        rows = weights[name][unseen.ids_U]
        assert torch.equal(rows, rows[:1].expand_as(rows))
        assert not torch.equal(rows[0], model.state_dict()[name][unseen.ids_U[0]])
    assert len(weights["embedding.weight"].unique(dim=0)) == len(unseen.ids_R)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_several_processes_share_it_too(world, tmp_path, kind):
    terms, weights = some_steps(world, ALONE, "auto")
    found = forked.values(2, lambda processes: some_steps(world, processes, kind), tmp_path)
    for rank, (others, their_weights) in enumerate(found):
        for one, several in zip(terms, others, strict=True):
            assert several == pytest.approx(one, abs=1e-4)
        if kind == "ddp" or rank == 0:
            torch.testing.assert_close(their_weights, weights, rtol=1e-3, atol=1e-3)


def with_gaps(dataset, share):
    """The dataset with a vocabulary of which only a part is used: its training text has even ids only."""
    tokens = dataset.train.tokens - dataset.train.tokens % 2 if share else dataset.train.tokens
    return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, tokens=tokens))


def test_which_tokens_are_unseen(world, tmp_path):
    dataset = with_gaps(open_dataset("--data", world.data), share=True)
    size, given = dataset.tokenizer.vocabulary_size, {"data": world.data, "unseen_tokens": "share"}
    found = unseen_tokens(plan_run(TrainSettings(**given, no_teacher=True), dataset))
    assert set(found.ids_U.tolist()) == set(range(size)) - set(dataset.train.tokens.tolist())
    assert found.ids_R[found.place_V[found.ids_R]].equal(found.ids_R)
    assert set(found.place_V[found.ids_U].tolist()) == {len(found.ids_R) - 1}
    bias_R = found.bias_R(torch.arange(float(size)), torch.empty(0))
    assert bias_R[-1].item() == pytest.approx(found.ids_U[0].item() + math.log(len(found.ids_U)))
    for settings in (
        TrainSettings(**given),  # the teacher may want any token
        TrainSettings(**given | {"unseen_tokens": "separate"}, no_teacher=True),
        TrainSettings(**given, no_teacher=True, head="born"),
        TrainSettings(**given, no_teacher=True, start_from=tmp_path / "any.pt"),
    ):
        assert unseen_tokens(plan_run(settings, dataset)) is None
    every = dataclasses.replace(dataset.train, tokens=np.arange(len(dataset.train.tokens)) % size)
    all_seen = dataclasses.replace(dataset, train=every)
    assert unseen_tokens(plan_run(TrainSettings(**given, no_teacher=True), all_seen)) is None


def test_a_run_resumes_to_the_bit_and_only_with_the_same_choice(world, tmp_path):
    small = {"d_model": 8, "layers": 1, "heads": 1, "mlp_width": 16, "batch_tokens": 480, "no_teacher": True}

    def run(name, **changes):
        folders = {"data": world.data, "output": tmp_path / name, "logs": tmp_path / "logs", "save_every": 3}
        return TrainSettings(**{**small, **folders, "unseen_tokens": "share", "max_steps": 6, **changes})

    whole = loop.train(run("whole"))
    loop.train(run("stopped"))
    for path in (tmp_path / "stopped").glob("checkpoint_v4_epoch_*"):
        path.unlink()
    resumed = loop.train(run("stopped"))
    first, second = (load_checkpoint("", report.checkpoint).model for report in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="--unseen-tokens"):
        loop.train(run("stopped", unseen_tokens="separate"))
