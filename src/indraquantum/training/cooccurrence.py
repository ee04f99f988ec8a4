"""Embedding tables that know from the first step which tokens stand beside which.

It is counted how often two tokens stand side by side. The positive pointwise mutual information of these counts (PPMI)
makes a sparse matrix, and its singular value decomposition gives each token a vector. It takes seconds. Two tables are
made in this way:

- `cooccurrence_table`: a row of the matrix for each token, with the frequent tokens right before and right after it.
  Tokens that stand beside the same ones get similar vectors.
- `bigram_table`: a matrix of each token with each next one. The left vectors say what follows a token, and the right
  ones what it follows. A token's embedding holds both. A head that takes the embedding times i then meets the left
  vectors of one token with the right ones of the other, so that a new model already knows which token follows which.

docs/LOG.md has what each is worth (2026-11-29, 2026-12-01).

Sources: Church and Hanks 1990 (mutual information of words); Levy and Goldberg 2014, "Neural word embedding as implicit
matrix factorization"; Levy, Goldberg and Dagan 2015, "Improving distributional similarity with lessons learned from
word embeddings" (PPMI, the exponents 0.75 and 0.5); Halko, Martinsson and Tropp 2011, arXiv 0909.4061 (the
decomposition, torch.svd_lowrank).

Legend: V vocabulary, C contexts (frequent tokens), d width of the table, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    """Return a table (V, d) in which tokens that stand beside the same tokens are similar.

    Its numbers have a standard deviation of 1. The fewer times a token occurs, the more of its vector is drawn from a
    normal distribution with `seed`; of a token that never occurs, all.
    """
    counts_V, pairs = _count(splits, vocabulary_size)
    generator = np.random.default_rng([seed % 2**64, 2])
    drawn_Vd = generator.standard_normal((vocabulary_size, width), dtype=np.float32)
    matrix = _of_neighbours(pairs, counts_V)
    left_Vr, _ = _decomposed(matrix, min(width, *matrix.shape), seed)
    vectors_Vd = left_Vr @ _rotation(generator, width, left_Vr.shape[1])
    return torch.from_numpy(_mixed(vectors_Vd, drawn_Vd, counts_V))


def bigram_table(splits: Sequence[Split], vocabulary_size: int, width: int, paired: int, seed: int) -> Tensor:
    """Return a table (V, d) that knows which token follows which, for a head that takes the embedding times i.

    Of the first `paired` numbers of a row, the first half says what the token follows, and the second half what follows
    it. The others are drawn. With J for the turn, e_a J e_b is how much more likely b follows a than a follows b (in
    PPMI of the vectors, which all have the same length). Numbers and seed as in `cooccurrence_table`.
    """
    counts_V, pairs = _count(splits, vocabulary_size)
    generator = np.random.default_rng([seed % 2**64, 2])
    table_Vd = generator.standard_normal((vocabulary_size, width), dtype=np.float32)
    half = paired // 2
    if half:
        matrix = _sparse(*_ppmi(*pairs, vocabulary_size, vocabulary_size), (vocabulary_size, vocabulary_size))
        follows_Vr, followed_Vr = _decomposed(matrix, min(half, vocabulary_size), seed)
        rotation = _rotation(generator, half, follows_Vr.shape[1])  # the same for both, which keeps their products
        for vectors_Vr, place in ((followed_Vr, slice(half)), (follows_Vr, slice(half, 2 * half))):
            table_Vd[:, place] = _mixed(vectors_Vr @ rotation, table_Vd[:, place], counts_V)
    return torch.from_numpy(table_Vd)


class Pairs(NamedTuple):
    """All neighbours of the text that are in the same document, as token ids (N,)."""

    earlier: np.ndarray
    later: np.ndarray


def _count(splits: Sequence[Split], vocabulary_size: int) -> tuple[np.ndarray, Pairs]:
    """Return how often each token occurs, (V,), and the neighbours."""
    tokens, begins = _text(splits)
    together = ~begins[1:]
    return np.bincount(tokens, minlength=vocabulary_size), Pairs(tokens[:-1][together], tokens[1:][together])


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


def _of_neighbours(pairs: Pairs, counts_V: np.ndarray) -> Tensor:
    """Return the PPMI (V, 2C) of each token with the contexts before and after it."""
    contexts_C = np.argsort(-counts_V, kind="stable")[:CONTEXTS]
    place_V = np.full(len(counts_V), -1, dtype=np.int32)
    place_V[contexts_C] = np.arange(len(contexts_C))
    size = (len(counts_V), len(contexts_C))
    rows, before, values = _ppmi(pairs.later, place_V[pairs.earlier], *size)
    more_rows, after, more_values = _ppmi(pairs.earlier, place_V[pairs.later], *size)
    columns = np.append(before, after + len(contexts_C))
    return _sparse(
        np.append(rows, more_rows), columns, np.append(values, more_values), (len(counts_V), 2 * len(contexts_C))
    )


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


def _sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> Tensor:
    place = torch.from_numpy(np.stack([rows, columns]))
    numbers = torch.from_numpy(values.astype(np.float32))
    return torch.sparse_coo_tensor(place, numbers, shape, check_invariants=True).coalesce()


def _decomposed(matrix: Tensor, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the left and right vectors, both (..., r), whose product is about `matrix` at WEIGHTING 0.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        columns = min(rank + _MORE, *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, q=columns, niter=_ITERATIONS)
    weights_r = values[:rank] ** WEIGHTING
    return (left[:, :rank] * weights_r).numpy(), (right[:, :rank] * weights_r).numpy()


def _rotation(generator: np.random.Generator, width: int, rank: int) -> np.ndarray:
    """Return a random rotation (r, width), with which no column of the table is larger than others."""
    rotation, _ = np.linalg.qr(generator.standard_normal((width, rank)))
    return rotation.T.astype(np.float32)


def _mixed(vectors_Vd: np.ndarray, drawn_Vd: np.ndarray, counts_V: np.ndarray) -> np.ndarray:
    """Return `vectors_Vd`, all of length sqrt(d), mixed with `drawn_Vd` the more the rarer a token is."""
    norms_V1 = np.linalg.norm(vectors_Vd, axis=1, keepdims=True)
    is_known_V1 = norms_V1 > 1e-6 * norms_V1.max()
    share_V1 = np.where(is_known_V1, (counts_V / (counts_V + KNOWN))[:, None], 0).astype(np.float32)
    unit_Vd = vectors_Vd / np.where(is_known_V1, norms_V1, 1)
    return (np.sqrt(share_V1 * vectors_Vd.shape[1]) * unit_Vd + np.sqrt(1 - share_V1) * drawn_Vd).astype(np.float32)
