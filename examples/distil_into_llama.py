"""Distils a teacher into a Llama of transformers, in a training loop of your own.

    indra prepare ... && indra capture ...
    python examples/distil_into_llama.py data/mixed_train data/teacher_signals

The objective takes any model's states and output table. It never builds the logits.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from indraquantum import SemanticDistillationLoss, SignalCollator, TeacherSignals


def loss_of(student, batch, objective):
    """Cross-entropy plus `kd_weight` times the divergence from the teacher, of one batch."""
    states = student.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    signals = TeacherSignals(**batch["signals"])
    return objective(states.flatten(0, 1), student.lm_head.weight, batch["shift_labels"].flatten(), signals=signals)


def main(data, signals, steps=200, rows=8):
    """Train a small Llama; return it and the loss of each step."""
    torch.manual_seed(0)
    batches, losses = SignalCollator(data, signals), []
    objective = SemanticDistillationLoss(kd_weight=0.9, temperature=batches.temperature)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=batches.vocabulary_size, **sizes))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = batches(torch.randint(len(batches.rows), (rows,)).tolist())
        terms = loss_of(student, batch, objective)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms.total.item())
    return student, losses


if __name__ == "__main__":
    _, found = main(*sys.argv[1:])
    print(f"loss of the first step {found[0]:.3f}, of the last {found[-1]:.3f}")
