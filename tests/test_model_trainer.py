"""transformers' own Trainer on the model, with what it does to a Llama of the same weights as the reference."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from small_model import V, make, make_with_twin, tokens


def rows(count=24, length=9):
    """Rows of different lengths, padded as the usual collator does: labels are the ids, -100 on padding."""
    dataset = []
    for row in range(count):
        ids = tokens(length, seed=100 + row)
        real = 4 + row % (length - 3)
        mask = (torch.arange(length) < real).long()
        dataset.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask == 1, -100)})
    return dataset


def trainer(model, folder, compute_metrics=None, data=None, **options):
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, **options}
    arguments = TrainingArguments(
        folder, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0,
        max_grad_norm=0.0, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    data = data or rows()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:6], compute_metrics=compute_metrics)


def trained(model, folder, **options):
    """Logged losses and gradient norms."""
    run = trainer(model, folder, **options)
    run.train()
    return np.array([(log["loss"], log["grad_norm"]) for log in run.state.log_history if "loss" in log])


def next_token_loss(model, data):
    losses = []
    with torch.no_grad():
        for row in data:
            real = int(row["attention_mask"].sum())
            logits = model.eval()(row["input_ids"][None, :real]).logits[0]
            losses.append(F.cross_entropy(logits[:-1], row["input_ids"][1:real], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"label_smoothing_factor": 0.1},
        {"activation_checkpointing": True},
        {"bf16": True},
    ],
)
def test_training_goes_as_llamas(options, tmp_path):
    model, llama = make_with_twin()
    ours, theirs = trained(model, tmp_path, **options), trained(llama, tmp_path, **options)
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=0.03 if "bf16" in options else 2e-3)


def test_logged_loss_is_the_next_token_loss_and_falls(tmp_path):
    model, data = make(), rows(8)
    before = next_token_loss(model, data)
    logged = trained(model, tmp_path, data=data, max_steps=30)
    assert logged[0, 0] == pytest.approx(before, rel=1e-4)
    assert next_token_loss(model, data) < before - 1
    assert next_token_loss(model, data) == pytest.approx(logged[-1, 0], rel=0.2)


def test_documents_of_a_row_are_counted_as_they_are_learnt(tmp_path):
    """Trainer counts all labels from position 1 on, so the first token of a document has none."""
    model, pieces = make(), (4, 3, 2)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(pieces))
    starts, data, alone = segments.diff(prepend=segments[:1] - 1) > 0, [], []
    for row in range(8):
        ids = tokens(9, seed=row)
        data.append({"input_ids": ids, "segment_ids": segments, "labels": ids.masked_fill(starts, -100)})
        alone += [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in ids.split(pieces)]
    expected = next_token_loss(model, alone)
    assert trained(model, tmp_path, data=data, max_steps=1)[0, 0] == pytest.approx(expected, rel=1e-4)


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path):
    logged = [
        trained(
            make(), tmp_path, max_steps=1, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts
        )
        for parts in (1, 8)
    ]
    np.testing.assert_allclose(*logged, rtol=1e-4)


@pytest.mark.parametrize("return_dict", [True, False])
def test_metrics_are_computed_from_the_logits(return_dict, tmp_path):
    model, data = make(), rows()[:6]
    model.config.return_dict = return_dict

    def accuracy(prediction):
        assert prediction.predictions.shape == (6, 9, V)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}

    found = trainer(model, tmp_path, accuracy, per_device_eval_batch_size=4).evaluate()
    model.config.return_dict = True
    hits, total = 0, 0
    for row in data:
        real = int(row["attention_mask"].sum())
        with torch.no_grad():
            choice = model.eval()(row["input_ids"][None, : real - 1]).logits[0].argmax(-1)
        hits, total = hits + int((choice == row["input_ids"][1:real]).sum()), total + real - 1
    assert found["eval_accuracy"] == pytest.approx(hits / total)


@pytest.mark.parametrize("kind", ["quantum", "mean", "born", "bfloat16 weights"])
def test_bfloat16_training_is_close_to_float32(kind, tmp_path):
    model = make(**{"mean": {"readout": "mean"}, "born": {"head": "born"}}.get(kind, {}))
    exact = trained(copy.deepcopy(model), tmp_path)
    if kind == "bfloat16 weights":
        rounded = trained(model.to(torch.bfloat16), tmp_path)
    else:
        rounded = trained(model, tmp_path, bf16=True)
    np.testing.assert_allclose(rounded[:, 0], exact[:, 0], rtol=0.05)
    assert rounded[0, 1] == pytest.approx(exact[0, 1], rel=0.05)


def test_a_run_is_saved_and_resumed(tmp_path):
    from indraquantum.model import IndraQuantumPhase2

    whole = trainer(make(), tmp_path / "whole")
    whole.train()
    half = trainer(make(), tmp_path / "half")
    half.args.save_strategy, half.args.save_steps = "steps", 2
    half.train()
    again = trainer(make(seed=1), tmp_path / "half")
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    whole.save_model(tmp_path / "saved")
    saved = IndraQuantumPhase2.from_pretrained(tmp_path / "saved").state_dict()
    for name, weight in again.model.state_dict().items():
        torch.testing.assert_close(weight, saved[name])


def test_tokens_are_added_and_learnt(tmp_path):
    model = make()
    model.resize_token_embeddings(V + 2)
    data = rows(8)
    for row in data:
        row["input_ids"][1] = row["labels"][1] = V + 1
    trained(model, tmp_path, data=data, max_steps=30, learning_rate=3e-2)
    with torch.no_grad():
        assert (
            model.eval()(torch.stack([row["input_ids"][:1] for row in data])).logits[:, 0].argmax(-1) == V + 1
        ).all()
