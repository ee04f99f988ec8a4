"""The targets of each row of a chunk: label, the teacher's tokens without duplicates, missing mass, and weights.

Legend: n rows of a chunk, K kept teacher tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from indraquantum.kernels.arguments import (
    IGNORE_INDEX,
    MISSING_MASS_FLOOR,
    PADDING_ID,
    LinearInputs,
    ObjectiveOptions,
)


class DistinctTokens(NamedTuple):
    """A row's tokens, each at most once."""

    ids_nK: Tensor
    probs_nK: Tensor


@dataclass(frozen=True)
class SignalTargets:
    """The teacher's distribution q for each row, with its tail already treated."""

    ids_nK: Tensor  # distinct; 0 at padding
    probs_nK: Tensor  # 0 at padding
    is_real_nK: Tensor
    missing_n: Tensor  # mass outside the ids, if the tail's treatment uses it, else 0
    spread_n: Tensor  # uniform tail: probability of each token outside the ids; 0 otherwise
    mass_n: Tensor  # total mass of q, including the tail
    entropy_n: Tensor  # of q, nats
    share_n: Tensor  # tau^2 / token_count; 0 where the row has no ids


@dataclass(frozen=True)
class RowTargets:
    """All targets of a chunk of rows."""

    labels_n: Tensor
    share_n: Tensor  # 1 / token_count
    signals: SignalTargets | None

    @property
    def has_missing_mass(self) -> bool:
        """Whether any row's signals leave mass to tokens outside their ids, as only truncated signals do."""
        return self.signals is not None and bool((self.signals.missing_n * self.signals.share_n).any())


def counted_rows(inputs: LinearInputs) -> Tensor | None:
    """Return the indices of the rows that have a label; None if all have one."""
    counted_N = inputs.labels_N != IGNORE_INDEX
    return None if counted_N.all() else counted_N.nonzero().squeeze(1)


def row_targets(
    inputs: LinearInputs, options: ObjectiveOptions, rows: slice | Tensor, dtype: torch.dtype
) -> RowTargets:
    """Collect the targets of the given rows; all numbers are in `dtype`."""
    labels_n = inputs.labels_N[rows]
    share_n = torch.full_like(labels_n, 1 / inputs.token_count, dtype=dtype)
    signals = None
    if inputs.signal_ids_NK is not None and inputs.signal_probs_NK is not None:
        probs_nK = inputs.signal_probs_NK[rows].to(dtype)
        distinct = merge_duplicates(inputs.signal_ids_NK[rows], probs_nK)
        signals = _signal_targets(distinct, share_n, options, inputs.table_VD.shape[0])
    return RowTargets(labels_n, share_n, signals)


def merge_duplicates(ids_nK: Tensor, probs_nK: Tensor) -> DistinctTokens:
    """Add up the probabilities of repeated ids, so that each id stands once in its row."""
    sorted_nK, order_nK = ids_nK.sort(dim=1)
    repeats_nK = torch.zeros_like(ids_nK, dtype=torch.bool)
    repeats_nK[:, 1:] = (sorted_nK[:, 1:] == sorted_nK[:, :-1]) & (sorted_nK[:, 1:] >= 0)
    if not repeats_nK.any():
        return DistinctTokens(ids_nK, probs_nK)
    place_nK = (~repeats_nK).cumsum(dim=1) - 1
    merged_nK = torch.zeros_like(probs_nK).scatter_add_(1, place_nK, probs_nK.gather(1, order_nK))
    return DistinctTokens(torch.full_like(ids_nK, PADDING_ID).scatter_(1, place_nK, sorted_nK), merged_nK)


def _signal_targets(
    distinct: DistinctTokens, share_n: Tensor, options: ObjectiveOptions, vocabulary_size: int
) -> SignalTargets:
    is_real_nK = distinct.ids_nK >= 0
    probs_nK = distinct.probs_nK.masked_fill(~is_real_nK, 0.0)
    entropy_n = -torch.xlogy(probs_nK, probs_nK).sum(dim=1)
    mass_n = probs_nK.sum(dim=1)
    missing_n = spread_n = torch.zeros_like(mass_n)
    if options.tail != "none":
        others_n = vocabulary_size - is_real_nK.sum(dim=1)
        missing_n = 1 - mass_n
        missing_n = torch.where((missing_n > MISSING_MASS_FLOOR) & (others_n > 0), missing_n, 0.0)
        mass_n = mass_n + missing_n
        if options.tail == "uniform":
            spread_n = missing_n / others_n.clamp(min=1)
            entropy_n = entropy_n - torch.xlogy(missing_n, spread_n)
        else:
            entropy_n = entropy_n - torch.xlogy(missing_n, missing_n)
    return SignalTargets(
        distinct.ids_nK.clamp(min=0), probs_nK, is_real_nK, missing_n, spread_n, mass_n, entropy_n,
        share_n * options.temperature**2 * is_real_nK.any(dim=1),
    )  # fmt: skip
