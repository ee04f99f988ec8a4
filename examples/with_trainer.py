"""Trains IndraQuantumPhase2 with transformers' own Trainer, which gets the teacher's signals from a collator.

indra prepare ... && indra capture ...
python examples/with_trainer.py data/mixed_train data/teacher_signals
"""

import sys

from transformers import Trainer, TrainingArguments, set_seed

from indraquantum import IndraQuantumConfig, IndraQuantumPhase2, SemanticDistillationLoss, SignalCollator


def main(data, signals, steps=200, output="checkpoints/with_trainer"):
    """Train a small model; return the Trainer, whose state has the losses."""
    set_seed(0)
    batches, held_out = SignalCollator(data, signals), SignalCollator(data, signals, split="validation")
    objective = SemanticDistillationLoss(0.9, 0.1, 0.1, temperature=batches.temperature)
    sizes = {"d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 172}
    model = IndraQuantumPhase2(IndraQuantumConfig(vocab_size=batches.vocabulary_size, **sizes))
    arguments = TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=1,
        remove_unused_columns=False, report_to=[], save_strategy="no", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=batches.rows, eval_dataset=held_out.rows,
        data_collator=lambda rows: batches(rows) | {"objective": objective},
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    trained = main(*sys.argv[1:])
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    print(f"held-out loss {trained.evaluate()['eval_loss']:.3f}")
