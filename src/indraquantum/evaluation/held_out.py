"""Held-out cross-entropy per source: of a model, and of the token frequencies of the training rows.

Legend: N labelled positions, D real width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.split import Batch, Split
from indraquantum.kernels.onednn import onednn_products
from indraquantum.learner import Learner, labelled_positions, to_tensors
from indraquantum.memory import memory_needed
from indraquantum.processes import ALONE, Processes

MOST_ROWS, MOST_TOKENS = 16, 8192  # of a batch; a longer row is a batch of its own
LOGIT_ROWS = 256  # positions whose logits exist at a time


def held_out_cross_entropy(
    learner: Learner,
    dataset: PreparedDataset,
    device: torch.device,
    processes: Processes = ALONE,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the mean cross-entropy of `learner` on the validation split, nats per token, per source and for `all`.

    Each of `processes` takes some batches. The losses are put together in order, so the result is that of one process.
    `between` is called before each batch, equally often in all processes.
    """
    training = getattr(learner, "training", False)
    learner.eval()
    split, losses_N, sources_N = dataset.validation, [], []
    starts = np.arange(0, split.num_rows, rows_per_batch(split))
    own = processes.share(starts)
    # Not inference_mode: FSDP2 would keep its tensors, which autograd can't use.
    with onednn_products(device), torch.no_grad():
        table_VD = learner.lift_table()
        for place in range(math.ceil(len(starts) / processes.world)):
            between()
            batch = batch_at(split, own[place] if place < len(own) else 0)
            losses_n = losses_of(learner, table_VD, batch, device)
            if place < len(own):
                losses_N.append(losses_n)
                sources_N.append(batch.sources[batch.labelled])
    learner.train(training)
    parts = [part for parts in processes.gather(list(zip(losses_N, sources_N, strict=True))) for part in parts]
    losses, sources = map(np.concatenate, zip(*parts, strict=True))
    losses[np.isnan(losses)] = np.inf  # a loss that is not a number counts as infinite; `per_source` would leave it out
    return per_source(losses, sources, dataset.source_names)


def unigram_cross_entropy(dataset: PreparedDataset) -> dict[str, float]:
    """Return the cross-entropy of the training labels' frequencies (plus one each) on the validation split.

    It is in nats per token. A document's first token is never predicted and does not count, because BOS would take
    probability from the others.
    """
    counts_V = dataset.train.label_counts(dataset.tokenizer.vocabulary_size) + 1
    losses_V = np.log(counts_V.sum()) - np.log(counts_V)
    validation = list(batches(dataset.validation))
    labels = np.concatenate([batch.labels[batch.labelled] for batch in validation])
    sources = np.concatenate([batch.sources[batch.labelled] for batch in validation])
    return per_source(losses_V[labels], sources, dataset.source_names)


def per_source(losses_N: np.ndarray, sources_N: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Return the means of `losses_N` over each source that has any, and over `all`; NaN losses are left out."""
    known = ~np.isnan(losses_N)
    parts = {name: losses_N[known & (sources_N == number)] for number, name in enumerate(names)}
    parts["all"] = losses_N[known]
    return {name: float(part.mean(dtype=np.float64)) for name, part in parts.items() if len(part)}


def perplexity(cross_entropy: float) -> float:
    """Return the perplexity of a cross-entropy in nats per token; infinity if a float can't hold it."""
    return math.exp(cross_entropy) if cross_entropy < 709 else math.inf


def evaluation_fits(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside an evaluation, a lack of memory is an OutOfMemory that names --device: no option sets the batches."""
    allowed = "must have free memory for an evaluation; end other programs that use it, or prepare shorter rows"
    return memory_needed("--device", device, allowed)


def rows_per_batch(split: Split) -> int:
    """Return how many rows of `split` are read at once. The number decides the last bits of a loss."""
    return min(MOST_ROWS, max(1, MOST_TOKENS // split.row_length))


def batches(split: Split) -> Iterator[Batch]:
    """Yield all rows of `split`, a few at a time."""
    for start in range(0, split.num_rows, rows_per_batch(split)):
        yield batch_at(split, start)


def batch_at(split: Split, start: int) -> Batch:
    """Return the rows of `split` from `start` on, at most `rows_per_batch`."""
    return split.batch(np.arange(start, min(start + rows_per_batch(split), split.num_rows)))


def losses_of(learner: Learner, table_VD: torch.Tensor, batch: Batch, device: torch.device) -> np.ndarray:
    """Return the cross-entropy of each labelled position of `batch`, (N,)."""
    states_BTD = learner.hidden_states(**to_tensors(batch, device), table_VD=table_VD)
    states_ND, labels_N = labelled_positions(states_BTD, batch)
    losses = []
    for states_nD, labels_n in zip(states_ND.split(LOGIT_ROWS), labels_N.split(LOGIT_ROWS), strict=True):
        logits_nV = learner.logits(states_nD, table_VD).float()
        losses.append(F.cross_entropy(logits_nV, labels_n, reduction="none"))
    return torch.cat(losses).cpu().numpy()
