"""The table that starts from co-occurrence, against counts pair by pair and a dense decomposition."""

from __future__ import annotations

import collections
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from indraquantum.config import TrainSettings
from indraquantum.data.split import Split
from indraquantum.training import cooccurrence, loop
from indraquantum.training import run as training_run
from indraquantum.training.checkpoint import checkpoints_in, load_checkpoint, set_aside
from indraquantum.training.cooccurrence import cooccurrence_table
from indraquantum.trials.dry_run import dry_run

V = 12


def split_of(documents: list[list[int]]) -> Split:
    """A split of these documents; its rows don't matter."""
    return Split(
        tokens=np.array([token for document in documents for token in document], dtype=np.uint16),
        document_offsets=np.cumsum([0, *map(len, documents)]),
        document_sources=np.zeros(len(documents), dtype=np.uint8),
        pieces=np.empty((0, 2), dtype=np.int64),
        row_pieces=np.zeros(1, dtype=np.int64),
        row_length=8,
        padding_id=0,
    )


@pytest.fixture
def documents():
    draws = np.random.default_rng(0)
    return [(draws.integers(0, 4, size=9) ** 2 % (V - 2)).tolist() for _ in range(40)]


def expected_vectors(documents: list[list[int]], contexts: list[int], width: int) -> np.ndarray:
    """The vectors before they are scaled, from a count of each pair and the whole decomposition."""
    halves = []
    for step in (-1, 1):
        counts = collections.Counter(
            (document[i], document[i + step])
            for document in documents
            for i in range(len(document))
            if 0 <= i + step < len(document) and document[i + step] in contexts
        )
        of_token, of_context = collections.Counter(), collections.Counter()
        for (token, context), count in counts.items():
            of_token[token] += count
            of_context[context] += count
        total = sum(count**0.75 for count in of_context.values())
        half = np.zeros((V, len(contexts)))
        for (token, context), count in counts.items():
            information = math.log(count / (of_token[token] * of_context[context] ** 0.75 / total))
            half[token, contexts.index(context)] = max(0.0, information * count / (count + 1))
        halves.append(half)
    left, values, _ = np.linalg.svd(np.hstack(halves))
    return left[:, :width] * np.sqrt(values[:width])


@pytest.mark.parametrize("contexts", [3, 8192])
def test_vectors_are_those_of_a_count_pair_by_pair(monkeypatch, documents, contexts):
    monkeypatch.setattr(cooccurrence, "CONTEXTS", contexts)
    monkeypatch.setattr(cooccurrence, "KNOWN", 1e-9)  # nothing is drawn
    counts = np.bincount(np.concatenate(documents), minlength=V)
    frequent = np.argsort(-counts, kind="stable")[: min(contexts, V)].tolist()
    table = cooccurrence_table([split_of(documents[:15]), split_of(documents[15:])], V, 3, seed=1).numpy()
    vectors = expected_vectors(documents, frequent, 3)
    known = counts > 0
    assert 0 < known.sum() < V
    unit = vectors[known] / np.linalg.norm(vectors[known], axis=1, keepdims=True)
    # A rotation of all vectors is free, so their inner products are compared.
    np.testing.assert_allclose(table[known] @ table[known].T / 3, unit @ unit.T, atol=1e-4)


def test_rare_tokens_are_drawn_and_the_seed_decides(documents):
    one, same, other = (cooccurrence_table([split_of(documents)], 2000, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one[V:].std() == pytest.approx(1, abs=0.02)  # tokens that never occur
    assert one[:V].square().mean() == pytest.approx(1, abs=0.2)


def test_numbers_are_about_1_large_where_the_width_exceeds_the_rank():
    """40 tokens, each seen 3 times beside a single other one: half of the table is drawn."""
    pairs = [[2 * k, 2 * k + 1] for k in range(20)] * 3
    assert cooccurrence_table([split_of(pairs)], 40, 64, 0).square().mean() == pytest.approx(1, abs=0.1)


def test_text_of_one_token_and_no_pairs_starts_as_drawn():
    for documents in ([[5]], [[5], [5]], []):
        table = cooccurrence_table([split_of(documents)], V, 6, seed=3)
        assert table.shape == (V, 6)
        assert torch.isfinite(table).all()


def test_a_document_of_several_stages_counts_once(documents):
    whole = split_of(documents)
    first = replace(whole, pieces=np.array([[0, 9]]), places_elsewhere=np.zeros(1, dtype=np.int64))
    assert first.has_document.tolist() == [True] + [False] * 39
    assert torch.equal(cooccurrence_table([first, whole, whole], V, 3, 1), cooccurrence_table([whole], V, 3, 1))


def test_of_a_long_text_whole_documents_are_counted(monkeypatch, documents):
    monkeypatch.setattr(cooccurrence, "MOST_TOKENS", 9 * 20)
    half = cooccurrence_table([split_of(documents)], V, 3, seed=1)
    monkeypatch.undo()
    assert torch.equal(half, cooccurrence_table([split_of(documents[::2])], V, 3, seed=1))


def test_of_a_part_of_a_text_only_its_own_documents_are_counted(monkeypatch, documents):
    """It has 20 of 40 documents, with 180 tokens, so none of them is left out."""
    whole = split_of(documents)
    pieces = np.stack([whole.document_offsets[:20], np.full(20, 9)], axis=1)
    part = replace(whole, pieces=pieces, places_elsewhere=pieces[:, 0])
    monkeypatch.setattr(cooccurrence, "MOST_TOKENS", 180)
    assert torch.equal(cooccurrence_table([part], V, 3, 1), cooccurrence_table([split_of(documents[:20])], V, 3, 1))


@pytest.mark.parametrize(
    ("strategy", "sources"), [("stage1", {"wikitext"}), ("stage2-v3-gentle", {"wikitext", "alpaca"})]
)
def test_a_new_run_counts_the_text_of_all_its_stages(world, tmp_path, monkeypatch, strategy, sources):
    def counts(splits, vocabulary_size, width, seed):
        texts.extend(splits)
        return torch.full((vocabulary_size, width), 3.0)

    texts: list[Split] = []
    monkeypatch.setattr(training_run, "cooccurrence_table", counts)
    options = TrainSettings(
        data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", table_start="cooccurrence", table_std=0.5,
        strategy=strategy, d_model=6, layers=1, heads=2, mlp_width=10, threads=1,
    )  # fmt: skip
    run = training_run.trial_run(options)
    assert (run.model.embedding.weight == 1.5).all()
    data = run.plan.dataset
    expected = np.isin(data.train.document_sources, [data.source_names.index(name) for name in sources])
    assert np.logical_or.reduce([text.has_document for text in texts]).tolist() == expected.tolist()


def test_a_new_run_starts_with_it(world, tmp_path):
    run = TrainSettings(
        data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", table_start="cooccurrence", max_steps=1,
        learning_rate=1e-9, weight_decay=0.0, table_std=0.7, d_model=6, layers=1, heads=2, mlp_width=10, threads=1,
        no_teacher=True,
    )  # fmt: skip
    report = loop.train(run)
    whole = load_checkpoint("", report.checkpoint)
    table = whole.model["embedding.weight"]
    from indraquantum.data.dataset import open_dataset

    train = open_dataset("--data", world.data).train
    torch.testing.assert_close(table, 0.7 * cooccurrence_table([train], *table.shape, run.seed), atol=1e-5, rtol=0)


def test_only_a_new_run_counts_the_text(world, tmp_path, monkeypatch, capsys):
    def options(**changed) -> TrainSettings:
        return TrainSettings(
            data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", table_start="cooccurrence", max_steps=2,
            d_model=6, layers=1, heads=2, mlp_width=10, threads=1, no_teacher=True, save_every=1, keep_last=5,
            **changed,
        )  # fmt: skip

    counted = []
    count = cooccurrence_table

    def counts(*arguments):
        counted.append(1)
        return count(*arguments)

    monkeypatch.setattr(training_run, "cooccurrence_table", counts)
    dry_run(options(dry_run=True))
    assert not counted
    whole = load_checkpoint("", loop.train(options()).checkpoint).model
    assert len(counted) == 1
    for path in checkpoints_in(tmp_path / "run", lambda epoch: 2)[:-1]:
        set_aside([path[1]])
    resumed = load_checkpoint("", loop.train(options()).checkpoint).model
    assert "Resuming from step 1 of 2." in capsys.readouterr().out
    assert len(counted) == 1
    assert all(torch.equal(whole[name], weight) for name, weight in resumed.items())
