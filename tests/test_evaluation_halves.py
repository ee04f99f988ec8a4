"""The two halves of the held-out documents: disjoint, whole, and each document alone as the reference."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from indraquantum.data.dataset import open_dataset
from indraquantum.data.packing import packed_split
from indraquantum.evaluation.binned import binned, calibration_bins, readout_bins
from indraquantum.evaluation.figures import Predictions, expected_calibration_error, figures_by_source, predict
from indraquantum.evaluation.halves import bytes_by_source, documents_of_half, of_documents, positions_of_documents
from indraquantum.loss_v2 import TeacherSignals
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2

WORDS = ("cat", "dog", "bird", "fish", "mouse", "horse", "river", "hill")


@pytest.fixture(scope="module")
def dataset(world):
    """23 held-out documents in rows of 32, most rows with several documents and some documents in several rows."""
    prepared = open_dataset("--data", world.data)
    texts = [" ".join(WORDS[(i * j) % 8] for j in range(3 + 5 * i % 47)) for i in range(1, 23)]
    texts.append(texts[4])  # a copy in the other source
    documents = prepared.tokenizer.encode_documents(texts)
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
    split = packed_split(np.concatenate(documents), offsets, 32, prepared.tokenizer.eos_id)
    sources = np.array([i % 2 for i in range(22)] + [1], dtype=np.uint8)
    return replace(prepared, validation=replace(split, document_sources=sources)), texts


@pytest.fixture(scope="module")
def model(dataset):
    torch.manual_seed(1)
    config = IndraQuantumConfig(
        vocab_size=dataset[0].tokenizer.vocabulary_size, d_model=6, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=10,
    )  # fmt: skip
    return IndraQuantumPhase2(config).eval()


def test_halves_are_disjoint_and_whole(dataset):
    data, _ = dataset
    choice, table = (documents_of_half(data, half) for half in ("choice", "table"))
    assert (choice ^ table).all()
    for source in (0, 1):
        here = data.validation.document_sources == source
        assert abs(int(choice[here].sum()) - int(table[here].sum())) <= 2
    assert choice[4] == choice[22]
    split = data.validation
    parts = [positions_of_documents(split, half) for half in (choice, table)]
    assert (parts[0] ^ parts[1]).all()
    assert len(parts[0]) == split.num_tokens
    owners = {}
    for row in range(split.num_rows):  # by walking the rows: which document each place of the signals belongs to
        batch = split.batch(np.array([row]))
        segment_documents = split.piece_documents[split.row_pieces[row] : split.row_pieces[row + 1]]
        for index, segment in zip(batch.index[0], batch.segments[0], strict=True):
            if index >= 0:
                owners[int(index)] = int(segment_documents[segment])
    rows_of_both = 0
    for row in range(split.num_rows):
        index = split.batch(np.array([row])).index[0]
        rows_of_both += len({bool(choice[owners[int(i)]]) for i in index if i >= 0}) == 2
    assert rows_of_both > 3
    assert [bool(choice[owners[i]]) for i in range(split.num_tokens)] == parts[0].tolist()


def test_the_hash_of_the_text_decides(dataset):
    data, texts = dataset
    for source in (0, 1):
        here = sorted(
            (hashlib.sha256(b"half\0" + text.encode()).digest()[:8], text)
            for text in {text for text, s in zip(texts, data.validation.document_sources, strict=True) if s == source}
            if not (source == 1 and text == texts[4])  # which is the first source's
        )
        chosen = {text for place, (_, text) in enumerate(here) if place % 2}
        for number, (text, s) in enumerate(zip(texts, data.validation.document_sources, strict=True)):
            if s == source and number != 22:
                assert documents_of_half(data, "choice")[number] == (text in chosen)


def test_a_document_keeps_its_half_whatever_its_place(dataset):
    data, texts = dataset
    order = np.random.Generator(np.random.Philox(key=[0, 7])).permutation(len(texts))
    documents = data.tokenizer.encode_documents([texts[i] for i in order])
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int64)
    split = packed_split(np.concatenate(documents), offsets, 48, data.tokenizer.eos_id)
    sources = data.validation.document_sources.copy()
    sources[22] = sources[4]  # so that the order of the sources does not matter
    before = documents_of_half(replace(data, validation=replace(data.validation, document_sources=sources)), "table")
    moved = replace(data, validation=replace(split, document_sources=sources[order]))
    assert documents_of_half(moved, "table").tolist() == before[order].tolist()


@pytest.mark.parametrize("half", ["choice", "table"])
def test_figures_of_a_half_are_those_of_its_documents_alone(dataset, model, half):
    data, texts = dataset
    split, documents = data.validation, documents_of_half(data, half)
    found = of_documents(predict(model, split, torch.device("cpu")), split, documents)
    measured = figures_by_source(found, bytes_by_source(data, data.validation, documents))
    losses, hits, sizes = ({0: [], 1: []} for _ in range(3))
    for start, length in split.pieces.tolist():  # a piece restarts its positions: the reference runs each alone
        document = int(np.searchsorted(split.document_offsets, start, side="right") - 1)
        if not documents[document]:
            continue
        source = int(split.document_sources[document])
        stop = min(start + length + 1, int(split.document_offsets[document + 1]))
        labels = split.tokens[start + 1 : stop].tolist()
        with torch.no_grad():
            log_p = model(torch.tensor(split.tokens[start : start + length].astype(np.int64))[None]).logits[0]
        log_p = log_p.double().log_softmax(-1)
        losses[source] += [-log_p[i, label].item() for i, label in enumerate(labels)]
        hits[source] += [log_p[i].argmax().item() == label for i, label in enumerate(labels)]
    for number, text in enumerate(texts):
        if documents[number]:
            sizes[int(split.document_sources[number])].append(len(text.encode()))
    for source, name in enumerate(data.source_names):
        figures = measured[name]
        assert figures.tokens == len(losses[source])
        assert figures.cross_entropy == pytest.approx(np.mean(losses[source]), rel=1e-4)
        assert figures.accuracy == pytest.approx(np.mean(hits[source]))
        assert figures.bits_per_byte == pytest.approx(sum(losses[source]) / math.log(2) / sum(sizes[source]), rel=1e-4)
    assert measured["all"].tokens == sum(map(len, losses.values()))


def test_bins_by_hand():
    found = binned(np.array([4, 1, 4, 1]), np.array([8.0, 1.0, 9.0, 2.0]), np.array([1.0, 5.0, 3.0, 5.0]))
    assert found == {"count": [2, 2], "x": [1.5, 8.5], "y": [5.0, 2.0], "y_std": [0.0, 1.0]}


def test_readouts_in_bins_by_hand():
    """Five positions of a vocabulary of 7 tokens. The first has no signals. The largest entropy is ln 7."""

    class Store:
        def batch(self, split, index_N):
            assert (split, index_N.tolist()) == ("validation", [3, 5, 8, 9, 11])
            ids_NK = torch.tensor([[-1, -1], [2, -1], [0, 1], [3, 4], [5, 6]])
            entropy_N = torch.tensor([0.5, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64) * math.log(7)
            confidence_N = torch.tensor([0.5, 0.05, 0.95, 0.95, 0.05], dtype=torch.float64)
            return TeacherSignals(ids_NK, torch.ones(5, 2), entropy_N, confidence_N)

    others = dict.fromkeys(Predictions._fields, np.zeros(5))
    readouts = {"magnitude_N": np.array([9.0, 1, 2, 4, 1]), "phase_N": np.array([9.0, -0.5, 1, 2, 3])}
    found = readout_bins(Predictions(**others | readouts | {"index_N": np.array([3, 5, 8, 9, 11])}), Store(), 7)
    assert found.keys() == {"magnitude", "phase"}
    assert found["magnitude"] == {
        "count": [2, 2], "x": pytest.approx([0.05, 0.95]), "y": [1.0, 3.0], "y_std": [0.0, 1.0],
    }  # fmt: skip
    assert found["phase"] == {
        "count": [1, 1, 2], "x": pytest.approx([0.0, math.log(7) / 2, math.log(7)]), "y": [-0.5, 3.0, 1.5],
        "y_std": [0.0, 0.0, 0.5],
    }  # fmt: skip


def test_calibration_bins_add_up_to_the_calibration_error():
    draw = np.random.Generator(np.random.Philox(key=[0, 3]))
    confidence, correct = draw.random(500), draw.random(500) < 0.4
    unknown = np.zeros(500)
    others = dict.fromkeys(Predictions._fields, unknown)
    found = calibration_bins(Predictions(**others | {"confidence_N": confidence, "correct_N": correct}))
    error = sum(n * abs(x - y) for n, x, y in zip(found["count"], found["x"], found["y"], strict=True)) / 500
    assert error == pytest.approx(expected_calibration_error(confidence, correct))
    assert sum(found["count"]) == 500
