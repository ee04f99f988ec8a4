"""How far a student of top-k signals stays from its teacher, by what becomes of the probability that they lack.

    python benchmarks/topk_tail.py --data data/mixed_train --teacher TEACHER [CHECKPOINT ...]

First students that could be the teacher: a table of their own over the teacher's own states, from 0, fitted to signals
of some training rows. Then each CHECKPOINT. All are compared on held-out rows with the teacher's whole distribution:
mean KL(teacher || student), nats per token. The teacher must have a linear head without a bias, as a Llama has.

Legend: N positions, D width of the teacher, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.split import Split
from indraquantum.inference.load import load_model
from indraquantum.learner import to_tensors
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.masks import document_mask
from indraquantum.teacher.loading import load_teacher
from indraquantum.teacher.teacher_files import find_teacher
from indraquantum.teacher.teacher_model import Teacher

STEPS, RATE, BATCH = 600, 0.02, 1024
ALONE = 1e4  # weight of distillation that drowns the cross-entropy beside it


class Asked(NamedTuple):
    """A teacher at the labelled positions of some rows."""

    states_ND: torch.Tensor
    log_p_NV: torch.Tensor


def ask(teacher: Teacher, dataset: PreparedDataset, split: Split, rows: int) -> Asked:
    """The teacher's states and log-probabilities at the first rows of `split`."""
    batch = split.batch(np.arange(min(rows, split.num_rows)))
    with torch.inference_mode():
        states_BTD = teacher.model(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=document_mask(torch.from_numpy(batch.segments)),
            position_ids=torch.from_numpy(batch.positions),
            use_cache=False, output_hidden_states=True, logits_to_keep=1,
        ).hidden_states[-1]  # fmt: skip
        states_ND = states_BTD.flatten(0, 1)[torch.from_numpy(batch.labels.reshape(-1) >= 0)].float()
        head_VD = teacher.model.get_output_embeddings().weight[: dataset.tokenizer.vocabulary_size].float()
        log_p_NV = (states_ND @ head_VD.T).log_softmax(-1)
    return Asked(states_ND.clone(), log_p_NV.clone())


def divergence(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> float:
    """Mean KL(teacher || student) of log-probabilities, nats."""
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1).mean().item()


def fitted(states_ND: torch.Tensor, signals: TeacherSignals, vocabulary_size: int, tail: str) -> torch.Tensor:
    """A table (V, D) after STEPS of Adam on the distillation term, the rate falling to 0."""
    table_VD = torch.zeros(vocabulary_size, states_ND.shape[1], requires_grad=True)
    objective = SemanticDistillationLoss(ALONE, tail=tail)
    optimizer = torch.optim.Adam([table_VD], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(0, len(states_ND), (BATCH,), generator=generator)
        part = TeacherSignals(signals.ids_NK[rows], signals.probs_NK[rows])
        optimizer.zero_grad()
        total = objective(states_ND[rows], table_VD, torch.zeros(BATCH, dtype=torch.long), signals=part).total
        (total / ALONE).backward()
        optimizer.step()
        schedule.step()
    return table_VD.detach()


def main() -> None:
    """Print a line for each kind of signals, and for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--rows", type=int, default=100, help="rows to learn from, and to be compared on")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    given = parser.parse_args()
    dataset = open_dataset("--data", given.data)
    teacher = load_teacher(find_teacher("--teacher", given.teacher), dataset, torch.device("cpu"))
    seen, held_out = (ask(teacher, dataset, split, given.rows) for split in (dataset.train, dataset.validation))
    probs_NK, ids_NK = seen.log_p_NV.exp().topk(given.top_k, dim=-1)
    print(f"{len(ids_NK):,} positions; the {given.top_k} likeliest tokens hold {probs_NK.sum(-1).mean():.3f} of them")
    generator = torch.Generator().manual_seed(0)
    drawn_NK = seen.log_p_NV.exp().multinomial(given.draws, replacement=True, generator=generator)
    likeliest = TeacherSignals(ids_NK, probs_NK)
    drawn = TeacherSignals(drawn_NK, torch.full(drawn_NK.shape, 1 / given.draws))
    for signals, tail in ((likeliest, "none"), (likeliest, "uniform"), (likeliest, "bucket"), (drawn, "none")):
        table_VD = fitted(seen.states_ND, signals, dataset.tokenizer.vocabulary_size, tail)
        student_NV = (held_out.states_ND @ table_VD.T).log_softmax(-1)
        kind = f"{given.draws} draws" if signals is drawn else f"top {given.top_k}, {tail}"
        print(f"linear student, {kind}: {divergence(held_out.log_p_NV, student_NV):.3f}", flush=True)
    batch = dataset.validation.batch(np.arange(min(given.rows, dataset.validation.num_rows)))
    labelled = torch.from_numpy(batch.labels.reshape(-1) >= 0)
    for path in given.checkpoints:
        model, _ = load_model(path, torch.device("cpu"))
        with torch.inference_mode():
            table_VD = model.lift_table()
            states_BTD = model.hidden_states(**to_tensors(batch, torch.device("cpu")), table_VD=table_VD)
            student_NV = model.logits(states_BTD.flatten(0, 1)[labelled], table_VD).float().log_softmax(-1)
        print(f"{path.parent.name}: {divergence(held_out.log_p_NV, student_NV):.3f}")


if __name__ == "__main__":
    main()
