"""Held-out figures against each document alone under plain F.cross_entropy, and against hand-counted frequencies."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from indraquantum.data.dataset import open_dataset
from indraquantum.errors import OutOfMemory
from indraquantum.evaluation import held_out
from indraquantum.evaluation.figures import evaluate, predict
from indraquantum.evaluation.held_out import (
    batches,
    held_out_cross_entropy,
    per_source,
    perplexity,
    unigram_cross_entropy,
)
from indraquantum.kernels import onednn
from indraquantum.kernels.ways import Way, using
from indraquantum.training.pretrain_teacher import LlamaLearner


def test_means_per_source_by_hand():
    losses, sources = np.array([1.0, 2.0, 6.0, np.nan]), np.array([0, 1, 1, 0])
    assert per_source(losses, sources, ("a", "b", "empty")) == {"a": 1.0, "b": 4.0, "all": 3.0}


def test_a_model_that_says_nan_has_no_figure_left_out(world):
    """A teacher's loss that is not known is left out; a model's that is no number is none."""
    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(AutoModelForCausalLM.from_pretrained(world.teacher).eval())
    with torch.no_grad():
        learner.llama.model.embed_tokens.weight[dataset.validation.tokens[0]] = math.nan
    assert set(held_out_cross_entropy(learner, dataset, torch.device("cpu")).values()) == {math.inf}


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    assert perplexity(math.log(31)) == pytest.approx(31)


def test_unigram_counts_every_training_label_and_one_more(world):
    """Labels, not tokens: a document's first token, BOS, is never one."""
    dataset = open_dataset("--data", world.data)
    counts = [1] * dataset.tokenizer.vocabulary_size
    for row in range(dataset.train.num_rows):
        for label in dataset.train.batch(np.array([row])).labels[0].tolist():
            if label >= 0:
                counts[label] += 1
    assert counts[dataset.tokenizer.bos_id] == 1
    assert sum(counts) == len(counts) + len(dataset.train.tokens) - dataset.train.num_documents
    losses = {name: [] for name in dataset.source_names}
    for document, source in enumerate(dataset.validation.document_sources):
        start, stop = dataset.validation.document_offsets[document : document + 2]
        for token in dataset.validation.tokens[start + 1 : stop].tolist():
            losses[dataset.source_names[source]].append(-math.log(counts[token] / sum(counts)))
    figures = unigram_cross_entropy(dataset)
    assert set(figures) == {"wikitext", "alpaca", "all"}
    for name, values in losses.items():
        assert figures[name] == pytest.approx(sum(values) / len(values))
    assert figures["wikitext"] != pytest.approx(figures["alpaca"])


@pytest.mark.parametrize(
    ("row_length", "sizes"),
    [(48, [16, 16, 3]), (512, [16, 16, 3]), (513, [15, 15, 5]), (4096, [2] * 17 + [1]), (32_768, [1] * 35)],
)
def test_long_rows_are_read_a_few_at_a_time(row_length, sizes):
    """A batch of more than one row has at most 16 rows and at most 8,192 tokens."""
    split = SimpleNamespace(num_rows=35, row_length=row_length, batch=lambda rows: rows.tolist())
    read = list(batches(split))
    assert [len(rows) for rows in read] == sizes
    assert [row for rows in read for row in rows] == list(range(35))


def test_rows_read_a_few_at_a_time_have_the_same_figures(world, monkeypatch):
    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(AutoModelForCausalLM.from_pretrained(world.teacher).eval())
    expected = held_out_cross_entropy(learner, dataset, torch.device("cpu"))
    monkeypatch.setattr(held_out, "MOST_TOKENS", 2 * dataset.row_length)  # as if rows were long
    sizes, losses_of = [], held_out.losses_of
    monkeypatch.setattr(held_out, "losses_of", lambda *a: sizes.append(len(a[2].labels)) or losses_of(*a))
    assert held_out_cross_entropy(learner, dataset, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)
    assert set(sizes) <= {1, 2}
    assert sum(sizes) == dataset.validation.num_rows


@pytest.mark.parametrize(
    "measure", [held_out_cross_entropy, lambda model, data, device: predict(model, data.validation, device)]
)
def test_evaluations_on_other_devices_leave_onednns_setting_alone(world, monkeypatch, measure):
    """Inside the setting, torch's own `get_float32_matmul_precision` raises an error."""
    monkeypatch.setattr(onednn, "is_exact", lambda: True)
    settings, seen = torch.backends.mkldnn.matmul, []
    before = settings.fp32_precision

    def lift_table():
        seen.append(settings.fp32_precision)
        raise KeyError

    learner = SimpleNamespace(eval=lambda: None, lift_table=lift_table)
    for device in ("cpu", "cuda"):
        with pytest.raises(KeyError), using(Way("onednn")):
            measure(learner, open_dataset("--data", world.data), torch.device(device))
    assert seen == ["bf16", before]


def test_an_evaluation_that_does_not_fit_into_memory_is_one_line(world):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    split = open_dataset("--data", world.data).validation
    with pytest.raises(OutOfMemory, match=r"^--device: got cpu; must have free memory for an evaluation"):
        evaluate(SimpleNamespace(lift_table=full), split, {}, torch.device("cpu"))


def test_cross_entropy_is_that_of_each_piece_alone(world):
    """The reference never packs: one piece at a time through transformers' own model and its own logits."""
    dataset = open_dataset("--data", world.data)
    llama = AutoModelForCausalLM.from_pretrained(world.teacher).eval()
    split = dataset.validation
    losses = {name: [] for name in dataset.source_names}
    for (start, length), document in zip(split.pieces.tolist(), split.piece_documents.tolist(), strict=True):
        tokens = torch.tensor(split.tokens[start : start + length].astype(np.int64))
        following = split.tokens[start + 1 : min(start + length + 1, split.document_offsets[document + 1])]
        labels = torch.tensor(following.astype(np.int64))
        with torch.no_grad():
            logits = llama(tokens[None]).logits[0, : len(labels)]
        source = dataset.source_names[split.document_sources[document]]
        losses[source] += F.cross_entropy(logits, labels, reduction="none").tolist()
    figures = held_out_cross_entropy(LlamaLearner(llama), dataset, torch.device("cpu"))
    for name, values in losses.items():
        assert figures[name] == pytest.approx(sum(values) / len(values), rel=1e-4)
    everything = [loss for values in losses.values() for loss in values]
    assert figures["all"] == pytest.approx(sum(everything) / len(everything), rel=1e-4)
