"""The examples run, and what they claim is so: losses fall, and are those of plain cross-entropy and divergence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import indraquantum
from indraquantum import SemanticDistillationLoss, SignalCollator, TeacherSignals
from indraquantum.config import CaptureSettings
from indraquantum.teacher.capture import capture
from indraquantum.teacher.collator import Row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_loss(logits_BTV, batch, kd_weight):
    """The same by torch's functions on the whole vocabulary, per labelled position."""
    labels = batch["shift_labels"].flatten()
    log_p = logits_BTV.flatten(0, 1).double().log_softmax(-1)
    count = (labels >= 0).sum()
    signals = TeacherSignals(**batch["signals"])
    known = (labels >= 0) & (signals.ids_NK >= 0).any(1)
    q = torch.zeros_like(log_p).scatter_add_(1, signals.ids_NK.clamp(min=0), signals.probs_NK.double())
    kl = F.kl_div(log_p[known], q[known], reduction="sum")
    return (F.cross_entropy(log_p, labels, ignore_index=-100, reduction="sum") + kd_weight * kl) / count


def test_distil_into_llama(world):
    module = example("distil_into_llama")
    student, losses = module.main(world.data, world.signals, steps=25)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7
    batch = SignalCollator(world.data, world.signals)([0, 5, 2])
    found = module.loss_of(student, batch, SemanticDistillationLoss(kd_weight=0.5)).total
    logits = student(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert found.item() == pytest.approx(plain_loss(logits, batch, 0.5).item(), rel=1e-4)


def test_with_trainer(world, tmp_path):
    trainer = example("with_trainer").main(world.data, world.signals, steps=25, output=str(tmp_path))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7
    batch = SignalCollator(world.data, world.signals)([1, 3])
    model = trainer.model.eval()
    objective = SemanticDistillationLoss(kd_weight=0.5)
    found = model(**batch, objective=objective)
    assert found.loss.item() == pytest.approx(plain_loss(found.logits, batch, 0.5).item(), rel=1e-4)
    assert model(**batch).terms.phase > 0  # with v4's weights the readouts are aligned
    held_out = SignalCollator(world.data, world.signals, split="validation")
    parts = torch.arange(len(held_out.rows)).split(trainer.args.eval_batch_size)
    own = trainer.data_collator(trainer.train_dataset[:1])["objective"]
    losses = [model(**held_out(part.tolist()), objective=own).loss.item() * len(part) for part in parts]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(held_out.rows), rel=1e-5)


def test_the_examples_compare_at_the_temperature_of_the_signals(world, tmp_path):
    soft = tmp_path / "soft"
    capture(CaptureSettings(data=world.data, teacher=str(world.teacher), output=soft, temperature=2.0, device="cpu"))
    batches = SignalCollator(world.data, soft)
    assert (batches.temperature, SignalCollator(world.data).temperature) == (2.0, 1.0)
    trainer = example("with_trainer").main(world.data, soft, steps=1, output=str(tmp_path / "run"))
    assert trainer.data_collator(trainer.train_dataset[:2])["objective"].temperature == 2.0
    with pytest.raises(ValueError, match=r"temperature: got 1\.0; must be the temperature of the signals"):
        trainer.model(**batches([0, 1]))
    _, losses = example("distil_into_llama").main(world.data, soft, steps=1)
    assert len(losses) == 1


def test_ten_lines(world, tmp_path):
    report, written = example("ten_lines").main(str(world.wikitext), str(world.tokenizer), folder=str(tmp_path))
    assert report.held_out["all"] < 5  # ln 320 = 5.77 by chance
    assert written.text == "".join(token.text for token in written.tokens)


def test_the_collator_of_either_split_takes_the_rows_of_both(world):
    train, held_out = (SignalCollator(world.data, world.signals, split=split) for split in ("train", "validation"))
    for own in (train, held_out):
        expected = own([2, 0])  # numbers are of the collator's own split
        for batches in (train, held_out):
            found = batches([own.rows[2], own.rows[0]])
            assert torch.equal(found["input_ids"], expected["input_ids"])
            assert torch.equal(found["signals"]["ids_NK"], expected["signals"]["ids_NK"])
    assert not torch.equal(train([0])["input_ids"], held_out([0])["input_ids"])
    assert list(train.rows[1:3]) == [train.rows[1], train.rows[2]]
    with pytest.raises(ValueError, match="rows: got rows of train and validation; must be of one split"):
        train([train.rows[0], held_out.rows[0]])


def test_the_collator_s_labels_are_the_dataset_s(world):
    batch = SignalCollator(world.data)([0, 1])
    assert "signals" not in batch
    same_document = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    inside = same_document & (batch["segment_ids"][:, 1:] >= 0)
    assert torch.equal(batch["shift_labels"][:, :-1][inside], batch["input_ids"][:, 1:][inside])
    assert (batch["labels"] == batch["input_ids"])[batch["segment_ids"] >= 0].all()
    with pytest.raises(indraquantum.InvalidInput, match="--data: got nowhere"):
        SignalCollator("nowhere")


def test_a_split_that_the_collator_lacks_is_one_line(world, tmp_path):
    """A capture asks about the rows of train and validation only."""
    with pytest.raises(indraquantum.InvalidInput, match=r"^--split: got dev; must be train or validation"):
        SignalCollator(world.data, split="dev")
    with pytest.raises(indraquantum.InvalidInput, match=r"^--split: got test; must be train or validation,"):
        SignalCollator(world.data, world.signals, split="test")
    with pytest.raises(ValueError, match=r"^--split: got test; must be train or validation, the splits of the data"):
        SignalCollator(world.data, world.signals)([Row("test", 0)])
