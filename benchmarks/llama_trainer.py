"""The baseline of time_to_loss.py: transformers' Llama under transformers' Trainer, on the same rows.

    python benchmarks/llama_trainer.py --data data/user_scale --output build/llama/run --logs build/llama/logs

It has the parameters of the former default model (at V = 32,000: 7.4M), with tied embeddings, AdamW and a cosine
schedule, and writes the metrics that `indra train` writes too: tokens, tokens per second and the held-out loss of
each evaluation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from indraquantum import SignalCollator


def main() -> None:
    """Train and write the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "output", "logs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (
        ("max-steps", 400), ("seed", 0), ("batch-tokens", 2048), ("evaluate-every", 25), ("threads", 2),
        ("save-every", 0), ("epochs", 0), ("width", 180), ("layers", 4), ("heads", 3), ("mlp-width", 506),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("learning-rate", 2e-3), ("weight-decay", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    set_seed(given.seed)
    train, held_out = SignalCollator(given.data), SignalCollator(given.data, split="validation")
    config = LlamaConfig(
        vocab_size=train.vocabulary_size, hidden_size=given.width, intermediate_size=given.mlp_width,
        num_hidden_layers=given.layers, num_attention_heads=given.heads, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = given.batch_tokens // collated(train, [0])["input_ids"].shape[1]
    arguments = TrainingArguments(
        str(given.output), max_steps=given.max_steps, per_device_train_batch_size=rows, seed=given.seed, use_cpu=True,
        learning_rate=given.learning_rate, weight_decay=given.weight_decay, adam_beta2=0.95,
        lr_scheduler_type="cosine", warmup_steps=round(0.05 * given.max_steps), bf16=given.precision == "bfloat16",
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    log = given.logs / given.output.name / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    clock = Clock(log, given.evaluate_every, given.batch_tokens, lambda: cross_entropy(model, held_out))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=list(train.rows),
        data_collator=lambda chosen: collated(train, chosen),
        callbacks=[clock],
    )
    trainer.train()


def collated(batches: SignalCollator, rows: list[int]) -> dict[str, torch.Tensor]:
    """Return rows as transformers' Llama takes them. Nothing predicts a document's first token."""
    batch = batches(rows)
    labels = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": labels}


def cross_entropy(model: LlamaForCausalLM, held_out: SignalCollator) -> float:
    """Return the held-out cross-entropy over the positions that `indra train` measures, nats per token."""
    losses = []
    model.eval()
    with torch.no_grad():
        for rows in np.array_split(np.arange(len(held_out.rows)), max(1, len(held_out.rows) // 8)):
            batch = held_out(list(rows))
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            labels = batch["shift_labels"]
            losses.append(F.cross_entropy(logits[labels >= 0].float(), labels[labels >= 0], reduction="none"))
    model.train()
    return float(torch.cat(losses).mean(dtype=torch.float64))


class Clock(TrainerCallback):
    """Times each step, and evaluates now and then; evaluations are not in the times."""

    def __init__(self, log: Path, every: int, tokens: int, evaluate: Any) -> None:
        self.log, self.every, self.tokens, self.evaluate, self.start = log, every, tokens, evaluate, 0.0

    def on_train_begin(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the line of step 0. The file is there before its evaluation, which is not in the time."""
        self.log.touch()
        self._write(0, None, self.evaluate())
        self.start = time.monotonic()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the line of a step."""
        seconds = time.monotonic() - self.start
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        self._write(state.global_step, self.tokens / seconds, self.evaluate() if due else None)
        self.start = time.monotonic()

    def _write(self, step: int, rate: float | None, loss: float | None) -> None:
        held_out = None if loss is None else {"all": loss}
        line = {"step": step, "tokens": step * self.tokens, "tokens_per_second": rate, "held_out": held_out}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
