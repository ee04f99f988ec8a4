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
from indraquantum.errors import UserError
from indraquantum.model import IndraQuantumConfig
from indraquantum.training import cooccurrence, loop
from indraquantum.training import run as training_run
from indraquantum.training.checkpoint import checkpoints_in, load_checkpoint, set_aside
from indraquantum.training.cooccurrence import bigram_table, cooccurrence_table
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


def information(documents: list[list[int]], contexts: list[int], step: int) -> np.ndarray:
    """The PPMI of each token with the token `step` after it, from a count of each pair."""
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
    found = np.zeros((V, len(contexts)))
    for (token, context), count in counts.items():
        value = math.log(count / (of_token[token] * of_context[context] ** 0.75 / total))
        found[token, contexts.index(context)] = max(0.0, value * count / (count + 1))
    return found


def expected_vectors(documents: list[list[int]], contexts: list[int], width: int) -> np.ndarray:
    """The vectors before they are scaled, from the whole decomposition."""
    left, values, _ = np.linalg.svd(np.hstack([information(documents, contexts, step) for step in (-1, 1)]))
    return left[:, :width] * np.sqrt(values[:width])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
    expected = unit(vectors[known])
    # A rotation of all vectors is free, so their inner products are compared.
    np.testing.assert_allclose(table[known] @ table[known].T / 3, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize(("width", "paired"), [(6, 6), (7, 6), (9, 5), (4, 4)])
def test_halves_of_a_bigram_table_are_the_two_sides_of_a_count_pair_by_pair(monkeypatch, documents, width, paired):
    monkeypatch.setattr(cooccurrence, "KNOWN", 1e-9)  # nothing is drawn
    half = paired // 2
    table = bigram_table([split_of(documents)], V, width, paired, seed=1).numpy()
    left, values, right = np.linalg.svd(information(documents, list(range(V)), 1))
    follows, followed = left[:, :half] * np.sqrt(values[:half]), right[:half].T * np.sqrt(values[:half])
    before = [token for token in range(V) if any(token in document[:-1] for document in documents)]
    after = [token for token in range(V) if any(token in document[1:] for document in documents)]
    products = table[after, :half] @ table[before, half : 2 * half].T / half
    np.testing.assert_allclose(products, unit(followed[after]) @ unit(follows[before]).T, atol=1e-3)
    drawn = table[:, 2 * half :]
    assert np.unique(drawn).size == drawn.size


@pytest.mark.parametrize(
    "options",
    [
        {"residual": True, "d_model": 40, "state_width": 40}, {"residual": True, "d_model": 44, "state_width": 20},
        {"projector": "none", "d_model": 40},
    ],
    ids=str,
)  # fmt: skip
def test_with_bigrams_a_new_model_knows_what_follows_a_token(world, tmp_path, monkeypatch, options):
    """Of a text in which one token always follows a certain other one."""
    follower = np.random.default_rng(0).permutation(40)
    text = split_of([[token, int(follower[token])] for token in range(40)] * 50)
    make = training_run.bigram_table
    monkeypatch.setattr(training_run, "bigram_table", lambda splits, *others: make([text], *others))
    settings = TrainSettings(
        data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", layers=1, heads=2, mlp_width=10, threads=1,
        residual_head="turned", table_start="bigrams", **options,
    )  # fmt: skip
    model = training_run.trial_run(settings).model
    with torch.no_grad():
        for projector in {model.projector, model.input_projector} - {None}:
            for weight in projector.parameters():  # what is left is the residual
                weight.zero_()
        scores = model.input_table()[:40] @ model.lift_table()[:40].T
    assert (scores.argmax(dim=1).numpy() == follower).mean() > 0.7  # by chance 0.03


def test_the_start_follows_from_the_head():
    for options, expected in (
        ({}, "bigrams"), ({"residual": False}, "cooccurrence"), ({"residual": True, "ends": "shared"}, "cooccurrence"),
        ({"projector": "none", "residual_head": "turned"}, "bigrams"),
        ({"residual": True, "table_start": "normal"}, "normal"), ({"projector": "none"}, "cooccurrence"),
    ):  # fmt: skip
        assert TrainSettings(**options).table_start_or_default == expected


def test_bigrams_need_a_turned_head():
    settings = TrainSettings(table_start="bigrams", residual=True, residual_head="same")
    with pytest.raises(UserError, match="--table-start: got bigrams; must be another one where --residual-head"):
        IndraQuantumConfig.from_settings(settings, 53, 1, 2)


def test_rare_tokens_are_drawn_and_the_seed_decides(documents):
    one, same, other = (cooccurrence_table([split_of(documents)], 2000, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one[V:].std() == pytest.approx(1, abs=0.02)  # tokens that never occur
    assert one[:V].square().mean() == pytest.approx(1, abs=0.2)


def test_rare_tokens_of_a_bigram_table_are_drawn_and_the_seed_decides(documents):
    one, same, other = (bigram_table([split_of(documents)], 2000, 64, 64, seed) for seed in (0, 0, 1))
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
        for table in (
            cooccurrence_table([split_of(documents)], V, 6, seed=3),
            bigram_table([split_of(documents)], V, 6, 6, seed=3),
        ):
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
