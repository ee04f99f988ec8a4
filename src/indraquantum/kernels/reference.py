"""The plain objective: full logits, dense targets and autograd. It is slow and large; the others are compared with it.

Legend: N rows (token positions), D real width, V vocabulary, K kept teacher tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from indraquantum.kernels.arguments import (
    IGNORE_INDEX,
    MISSING_MASS_FLOOR,
    LinearInputs,
    ObjectiveOptions,
    ObjectiveResult,
)

_NO_LOGIT = -1e30  # replaces -inf where an empty log-sum-exp must have a finite gradient


def reference_objective(inputs: LinearInputs, options: ObjectiveOptions) -> ObjectiveResult:
    """Compute the objective from full logits in the inputs' own precision, differentiable by autograd."""
    logits_NV = inputs.states_ND @ inputs.table_VD.T.to(inputs.states_ND.dtype)
    if inputs.scale is not None:
        logits_NV = inputs.scale * logits_NV
    if inputs.bias_V is not None:
        logits_NV = logits_NV + inputs.bias_V
    return dense_objective(logits_NV, inputs, options)


def dense_objective(logits_NV: Tensor, inputs: LinearInputs, options: ObjectiveOptions) -> ObjectiveResult:
    """Compute the objective of `logits_NV`; `inputs` gives only the labels, signals and token count."""
    counted_N = inputs.labels_N != IGNORE_INDEX
    weights_N = counted_N.to(logits_NV.dtype) / inputs.token_count
    losses_N = F.cross_entropy(logits_NV, inputs.labels_N, ignore_index=IGNORE_INDEX, reduction="none")
    ce = (weights_N * losses_N).sum()
    total = ce
    kd = kd_cross_entropy = None
    if inputs.signal_ids_NK is not None:
        cross_N, entropy_N = _distillation(logits_NV / options.temperature, inputs, options)
        has_ids_N = (inputs.signal_ids_NK >= 0).any(dim=1)
        weights_N = options.temperature**2 * torch.where(has_ids_N, weights_N, 0.0)
        kd_cross_entropy = (weights_N * cross_N).sum()
        kd = (weights_N * (cross_N - entropy_N)).sum()
        total = total + options.kd_weight * kd
    return ObjectiveResult(
        total, ce.detach(), None if kd is None else kd.detach(),
        None if kd_cross_entropy is None else kd_cross_entropy.detach(),
    )  # fmt: skip


class _Distillation(NamedTuple):
    """Both in nats, one number a row."""

    cross_entropy_N: Tensor  # of the student against the signals
    entropy_N: Tensor  # of the signals themselves


def _distillation(logits_NV: Tensor, inputs: LinearInputs, options: ObjectiveOptions) -> _Distillation:
    """Compare softmax(logits) with the signals, whose tail is treated as the options say."""
    log_probs_NV = logits_NV.log_softmax(dim=1)
    is_real_NK = inputs.signal_ids_NK >= 0
    ids_NK = inputs.signal_ids_NK.clamp(min=0)
    probs_NK = inputs.signal_probs_NK.to(logits_NV.dtype).masked_fill(~is_real_NK, 0.0)
    q_NV = torch.zeros_like(logits_NV).scatter_add(1, ids_NK, probs_NK)
    known_NV = torch.zeros_like(logits_NV).scatter_add(1, ids_NK, is_real_NK.to(logits_NV.dtype)) > 0
    missing_N = 1 - q_NV.sum(dim=1)
    has_tail_N = (missing_N > MISSING_MASS_FLOOR) & ~known_NV.all(dim=1)
    missing_N = torch.where(has_tail_N, missing_N, 0.0)
    if options.tail == "uniform":
        share_N = missing_N / (~known_NV).sum(dim=1).clamp(min=1)
        q_NV = torch.where(known_NV, q_NV, share_N[:, None])
    cross_N = -(q_NV * log_probs_NV).sum(dim=1)
    entropy_N = -torch.xlogy(q_NV, q_NV).sum(dim=1)
    if options.tail == "bucket":
        log_tail_N = log_probs_NV.masked_fill(known_NV, _NO_LOGIT).logsumexp(dim=1)
        cross_N = cross_N - torch.where(has_tail_N, missing_N * log_tail_N, 0.0)
        entropy_N = entropy_N - torch.xlogy(missing_N, missing_N)
    return _Distillation(cross_N, entropy_N)
