"""An embedding table that knows from the first step which tokens stand beside which.

It is counted how often each frequent token stands right before and right after each token. The positive pointwise
mutual information of these counts (PPMI) makes a matrix with a row for each token, and its singular value decomposition
gives each token a vector: tokens that stand beside the same ones get similar vectors. It takes seconds, and is worth as
much as half of a short run (docs/LOG.md, 2026-11-29).

Sources: Church and Hanks 1990 (mutual information of words); Levy, Goldberg and Dagan 2015, "Improving distributional
similarity with lessons learned from word embeddings" (PPMI, the exponents 0.75 and 0.5); Halko, Martinsson and Tropp
2011, arXiv 0909.4061 (the decomposition, torch.svd_lowrank).

Legend: V vocabulary, C contexts (frequent tokens), d width of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from indraquantum.data.split import Split

CONTEXTS = 8192  # the most frequent tokens
MOST_TOKENS = 2**24  # of the text; of longer texts, whole documents all over it are counted
SMOOTHING = 0.75  # exponent of the contexts' frequencies, so that rare contexts don't get too much weight
WEIGHTING = 0.5  # exponent of the singular values
KNOWN = 3  # occurrences at which a token's vector is half its own and half random
_MORE, _ITERATIONS = 16, 2  # of the decomposition: more columns than are kept, and passes over the matrix


def cooccurrence_table(splits: Sequence[Split], vocabulary_size: int, width: int, seed: int) -> Tensor:
    """Return a table (V, d) whose numbers have a standard deviation of 1.

    The fewer times a token occurs, the more of its vector is drawn from a normal distribution with `seed`; of a token
    that never occurs, all.
    """
    tokens, begins = _text(splits)
    counts_V = np.bincount(tokens, minlength=vocabulary_size)
    matrix = _matrix(tokens, begins, counts_V)
    generator = np.random.default_rng([seed % 2**64, 2])
    drawn_Vd = generator.standard_normal((vocabulary_size, width), dtype=np.float32)
    rank = min(width, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        columns = min(rank + _MORE, *matrix.shape)
        left, values, _ = torch.svd_lowrank(matrix, q=columns, niter=_ITERATIONS)
    vectors_Vr = (left[:, :rank] * values[:rank] ** WEIGHTING).numpy()
    # A random rotation, so that no column of the table is larger than others.
    rotation, _ = np.linalg.qr(generator.standard_normal((width, rank)))
    vectors_Vd = vectors_Vr @ rotation.T.astype(np.float32)
    norms_V1 = np.linalg.norm(vectors_Vd, axis=1, keepdims=True)
    is_known_V1 = norms_V1 > 1e-6 * norms_V1.max()
    share_V1 = np.where(is_known_V1, (counts_V / (counts_V + KNOWN))[:, None], 0).astype(np.float32)
    unit_Vd = vectors_Vd / np.where(is_known_V1, norms_V1, 1)
    table_Vd = np.sqrt(share_V1 * width) * unit_Vd + np.sqrt(1 - share_V1) * drawn_Vd
    return torch.from_numpy(table_Vd.astype(np.float32))


def _text(splits: Sequence[Split]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of `splits`, and whether a document begins with each of them. Each document counts once."""
    tokens, begins = [], []
    streams: dict[int, tuple[Split, np.ndarray]] = {}  # several splits may be parts of one stream
    for split in splits:
        first, there = streams.get(id(split.tokens), (split, np.False_))
        streams[id(split.tokens)] = first, there | split.has_document
    parts = [(split, np.diff(split.document_offsets), there) for split, there in streams.values()]
    every = max(1, math.ceil(sum(lengths[there].sum() for _, lengths, there in parts) / MOST_TOKENS))
    for split, lengths, there in parts:
        chosen = there & ((np.cumsum(there) - 1) % every == 0)
        is_first = np.zeros(len(split.tokens), dtype=bool)
        is_first[split.document_offsets[:-1][lengths > 0]] = True
        kept = np.repeat(chosen, lengths)
        tokens.append(split.tokens[kept])
        begins.append(is_first[kept])
    return np.concatenate(tokens), np.concatenate(begins)


def _matrix(tokens: np.ndarray, begins: np.ndarray, counts_V: np.ndarray) -> Tensor:
    """Return the PPMI (V, 2C) of each token with the contexts before and after it, as a sparse tensor."""
    contexts_C = np.argsort(-counts_V, kind="stable")[:CONTEXTS]
    place_V = np.full(len(counts_V), -1, dtype=np.int32)
    place_V[contexts_C] = np.arange(len(contexts_C))
    together = ~begins[1:]
    earlier, later = tokens[:-1][together], tokens[1:][together]
    size = (len(counts_V), len(contexts_C))
    rows, before, values = _ppmi(later, place_V[earlier], *size)
    more_rows, after, more_values = _ppmi(earlier, place_V[later], *size)
    place = np.stack([np.append(rows, more_rows), np.append(before, after + len(contexts_C))])
    numbers = torch.from_numpy(np.append(values, more_values).astype(np.float32))
    shape = (len(counts_V), 2 * len(contexts_C))
    return torch.sparse_coo_tensor(torch.from_numpy(place), numbers, shape, check_invariants=True).coalesce()


def _ppmi(
    tokens: np.ndarray, contexts: np.ndarray, num_tokens: int, num_contexts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, columns and values of the PPMI of pairs; -1 is no context.

    The values of pairs that were seen only a few times are lowered.
    """
    known = contexts >= 0
    number = np.uint32 if num_tokens * num_contexts < 2**32 else np.uint64
    pairs = tokens[known].astype(number) * number(num_contexts) + contexts[known].astype(number)
    pairs, counts = np.unique(pairs, return_counts=True)
    rows, columns = (part.astype(np.int64) for part in np.divmod(pairs, number(max(1, num_contexts))))
    tokens_V = np.bincount(rows, weights=counts, minlength=num_tokens)
    contexts_C = np.bincount(columns, weights=counts, minlength=num_contexts) ** SMOOTHING
    expected = tokens_V[rows] * contexts_C[columns] / max(1.0, contexts_C.sum())
    values = np.log(counts / expected) * counts / (counts + 1)
    positive = values > 0
    return rows[positive], columns[positive], values[positive]
