"""The tokens that a step compares: the frequent ones, those that it names, and a sample of the rest.

Most of the objective's work is for tokens that are rare or never occur: of 32,000 tokens, the 8,000 most frequent ones
make up 96 % of real text. Sampled softmax keeps the frequent tokens and all that a step's labels or signals name, and
draws a few of the others. Each drawn token stands for `others / drawn` tokens: the logarithm of this number is added to
its logit, so that the sum of the exponentials is an unbiased estimate of the whole sum. Its noise is small, because
rare tokens have a small part of the sum. Evaluations use all tokens. Nothing about the model changes.

A few more are drawn to make the number of candidates a round one. Otherwise each step would have matrices of new sizes.
oneDNN keeps code for the last 1,024 sizes, and the allocator can't reuse what an earlier step has freed: a run of 400
steps came to 3.6 GB of memory that way (docs/LOG.md, 2026-11-29).

Source: Bengio and Senécal, Adaptive importance sampling to accelerate training of a neural probabilistic language model
(2008). They draw from a distribution of all tokens; here the frequent ones are always there.

Legend: N labelled positions, K the teacher's tokens at a position, V vocabulary, R candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FREQUENT = 1 / 4  # of the vocabulary: always there
DRAWN = 1 / 32  # of the vocabulary: at least so many are drawn for each step from the others


@dataclass(frozen=True, eq=False)
class Candidates:
    """The tokens that a step compares."""

    ids_R: Tensor  # their ids, in ascending order
    place_V: Tensor  # the place of each token in `ids_R`; -1 if it is no candidate
    log_weight_R: Tensor  # the logarithm of the number of tokens that each stands for

    def to(self, device: torch.device) -> Candidates:
        """Return this with its tensors on `device`."""
        return Candidates(*(tensor.to(device) for tensor in (self.ids_R, self.place_V, self.log_weight_R)))

    def places(self, ids: Tensor) -> Tensor:
        """Return the place of each id, which must be a candidate; -1 stays -1."""
        return torch.where(ids < 0, ids, self.place_V[ids.clamp(min=0)])

    def bias_R(self, bias_V: Tensor | None) -> Tensor:
        """Return what is added to the candidates' logits, where `bias_V` (V,) is the head's bias."""
        return self.log_weight_R if bias_V is None else bias_V[self.ids_R] + self.log_weight_R


class CandidateSampler:
    """Chooses the candidates of each step. The choice depends on the step's seed and on the tokens that it names.

    Args:
        counts_V: how often each token occurs in the training text.
    """

    def __init__(self, counts_V: np.ndarray) -> None:
        size = len(counts_V)
        order_V = np.argsort(-counts_V, kind="stable")
        self._is_frequent_V = np.zeros(size, dtype=bool)
        self._is_frequent_V[order_V[: math.ceil(FREQUENT * size)]] = True
        self._drawn = math.ceil(DRAWN * size)

    def of_step(self, seed: int, named: Iterable[np.ndarray]) -> Candidates:
        """Return the candidates of a step with `seed`; `named` are the ids of its labels and signals, -1 for none."""
        is_exact_V = self._is_frequent_V.copy()
        for ids in named:
            is_exact_V[ids[ids >= 0]] = True
        others = np.flatnonzero(~is_exact_V)
        drawn = np.random.default_rng([seed % 2**64, 1]).permutation(others)[: self._to_draw(int(is_exact_V.sum()))]
        is_candidate_V, log_weight_V = is_exact_V.copy(), np.zeros(len(is_exact_V), dtype=np.float32)
        is_candidate_V[drawn], log_weight_V[drawn] = True, math.log(max(1, len(others)) / max(1, len(drawn)))
        ids_R = np.flatnonzero(is_candidate_V)
        place_V = np.full(len(is_exact_V), -1)
        place_V[ids_R] = np.arange(len(ids_R))
        return Candidates(*map(torch.from_numpy, (ids_R, place_V, log_weight_V[ids_R])))

    def _to_draw(self, exact: int) -> int:
        """Return how many tokens to draw beside `exact` others: so many that the sum is a multiple of `_drawn`."""
        return self._drawn + -exact % self._drawn
