"""The terms of a chunk, and the derivative of the total in its logits, once the normalisers are known.

Legend: n rows of a chunk, V vocabulary, K kept teacher tokens of a row, J = K + 1 (the label first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from indraquantum.kernels.arguments import ObjectiveOptions
from indraquantum.kernels.lanes import Lanes, Tiles
from indraquantum.kernels.targets import RowTargets, SignalTargets


@dataclass(frozen=True)
class Normalisers:
    """Natural logarithms, all relative to the same shift for each row as the logits."""

    log_total_n: Tensor  # log sum exp(z)
    log_warm_n: Tensor  # log sum exp(z / tau); the same at tau 1
    log_tail_n: Tensor | None  # log sum exp(z / tau) over the tokens outside a row's ids; bucket tail only


@dataclass(frozen=True)
class ChunkTerms:
    """One chunk's part of each term, unweighted."""

    ce: Tensor
    kd: Tensor
    kd_cross_entropy: Tensor

    def stacked(self) -> Tensor:
        """All three in one tensor, in this order."""
        return torch.stack((self.ce, self.kd, self.kd_cross_entropy))


def named_positions(targets: RowTargets) -> Tensor:
    """Return where the tokens that a row names are in a V x n buffer that is read as one line; (n, J)."""
    ids_nJ = targets.labels_n[:, None]
    if targets.signals is not None:
        ids_nJ = torch.cat((ids_nJ, targets.signals.ids_nK), dim=1)
    num_rows = ids_nJ.shape[0]
    return ids_nJ * num_rows + torch.arange(num_rows, device=ids_nJ.device)[:, None]


def chunk_terms(
    targets: RowTargets,
    options: ObjectiveOptions,
    named_nJ: Tensor,
    normalisers: Normalisers,
    logit_mean_n: Tensor,
    vocabulary_size: int,
) -> ChunkTerms:
    """Sum each term over the chunk's rows.

    Args:
        targets: the targets of the rows.
        options: temperature and tail.
        named_nJ: logits of the label and of the teacher's tokens, minus the shift.
        normalisers: the normalisers of the logits minus the shift.
        logit_mean_n: mean logit over the vocabulary, minus the shift; used for evenly spread mass only.
        vocabulary_size: V.

    Returns:
        The three sums.
    """
    share_n = targets.share_n
    ce_n = normalisers.log_total_n - named_nJ[:, 0]
    kd = kd_cross_entropy = torch.zeros_like(share_n).sum()
    if (signals := targets.signals) is not None:
        warm_nK = named_nJ[:, 1:] / options.temperature
        cross_n = signals.mass_n * normalisers.log_warm_n - (token_masses(signals) * warm_nK).sum(dim=1)
        cross_n -= signals.spread_n * (vocabulary_size / options.temperature) * logit_mean_n
        if normalisers.log_tail_n is not None:
            cross_n -= torch.where(signals.missing_n > 0, signals.missing_n * normalisers.log_tail_n, 0.0)
        kd_cross_entropy = (signals.share_n * cross_n).sum()
        kd = (signals.share_n * (cross_n - signals.entropy_n)).sum()
    return ChunkTerms((share_n * ce_n).sum(), kd, kd_cross_entropy)


def token_masses(signals: SignalTargets) -> Tensor:
    """Return the mass of each of a row's ids beyond the even spread; (n, K)."""
    return signals.probs_nK - signals.spread_n[:, None] * signals.is_real_nK


def named_weights(targets: RowTargets, options: ObjectiveOptions) -> Tensor:
    """Return how much the total falls per unit of each named logit, apart from softmax and even spread; (n, J)."""
    weights_nJ = targets.share_n[:, None]
    if (signals := targets.signals) is not None:
        kd_share_n = options.kd_weight / options.temperature * signals.share_n
        weights_nJ = torch.cat((weights_nJ, kd_share_n[:, None] * token_masses(signals)), dim=1)
    return weights_nJ


def even_weights(signals: SignalTargets, options: ObjectiveOptions) -> Tensor:
    """Return how much the total falls per unit of all logits alike; (n,)."""
    return options.kd_weight / options.temperature * signals.share_n * signals.spread_n


def softmax_weights(targets: RowTargets, options: ObjectiveOptions) -> Tensor:
    """Return the weight of the softmax that cross-entropy and distillation share at temperature 1; (n,)."""
    if targets.signals is None:
        return targets.share_n
    return targets.share_n + options.kd_weight * targets.signals.share_n * targets.signals.mass_n


def log_sum_exp(buffer_Vn: Tensor, lanes: Lanes, temperature: float) -> Tensor:
    """Return the log of the sum over the vocabulary of exp(z / temperature), tile by tile. The buffer is unchanged."""

    def of_lane(tiles: Tiles) -> Tensor:
        top_n = torch.stack([buffer_Vn[tile].amax(dim=0) for tile in tiles]).amax(dim=0) / temperature
        top_n = top_n.clamp(min=torch.finfo(top_n.dtype).min)  # if everything is masked, the result is -inf, not NaN
        sums = ((buffer_Vn[tile] / temperature).sub_(top_n).exp_().sum(dim=0) for tile in tiles)
        return top_n + sum(sums).log()

    return torch.stack(lanes.map(of_lane)).logsumexp(dim=0)


def log_tail_sum(
    buffer_Vn: Tensor, lanes: Lanes, temperature: float, signals: SignalTargets, positions_nJ: Tensor
) -> Tensor:
    """Return `log_sum_exp` over the tokens outside a row's ids. The buffer is unchanged afterwards."""
    line, known = buffer_Vn.view(-1), positions_nJ[:, 1:][signals.is_real_nK]
    kept = line[known]
    line[known] = float("-inf")
    log_tail_n = log_sum_exp(buffer_Vn, lanes, temperature)
    line[known] = kept
    return log_tail_n


def logits_to_gradient(
    buffer_Vn: Tensor,
    lanes: Lanes,
    targets: RowTargets,
    options: ObjectiveOptions,
    normalisers: Normalisers,
    positions_nJ: Tensor,
) -> None:
    """Overwrite a chunk's logits with the total's derivative in them, without the even spread, for any options."""
    slope_n = targets.share_n
    line, signals, temperature = buffer_Vn.view(-1), targets.signals, options.temperature
    has_kd = signals is not None and options.kd_weight > 0
    kd_share_n = options.kd_weight / temperature * signals.share_n if has_kd else None
    log_tail_n = normalisers.log_tail_n if has_kd else None
    if log_tail_n is not None:
        known = positions_nJ[:, 1:][signals.is_real_nK]
        known_rows = known % buffer_Vn.shape[1]
        logits = line[known]

    def softmaxes(tiles: Tiles) -> None:
        for tile in tiles:
            logits_vn = buffer_Vn[tile]
            gradient_vn = (logits_vn - normalisers.log_total_n).exp_().mul_(slope_n)
            if has_kd:
                warm_vn = logits_vn.div_(temperature)
                gradient_vn += (warm_vn - normalisers.log_warm_n).exp_().mul_(kd_share_n * signals.mass_n)
                if log_tail_n is not None:
                    gradient_vn -= warm_vn.sub_(log_tail_n).exp_().mul_(kd_share_n * signals.missing_n)
            logits_vn.copy_(gradient_vn)

    lanes.map(softmaxes)
    if log_tail_n is not None:  # the tail's softmax is over the other tokens only; here it may even be inf
        warm = (logits / temperature - normalisers.log_warm_n[known_rows]).exp_()
        softmax = (logits - normalisers.log_total_n[known_rows]).exp_()
        line[known] = slope_n[known_rows] * softmax + (kd_share_n * signals.mass_n)[known_rows] * warm
    line.index_put_((positions_nJ,), -named_weights(targets, options), accumulate=True)
