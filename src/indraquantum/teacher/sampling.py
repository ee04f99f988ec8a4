"""Reduces a teacher's logits to its signals: random draws, exact entropy and confidence, and the label's probability.

The draws are independent and from the full distribution (Sparse Logit Sampling, arXiv 2503.16870), so counts / draws is
an unbiased estimate of it, unlike a top-k cache. They are made from uniform numbers that depend only on (seed, split,
row), so that neither the batch size nor the order of the rows changes them.

Legend: N positions, C positions of one chunk, V vocabulary, n draws a position, M distinct (position, id)
pairs, G blocks of b neighbouring tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "validation")  # the number of a split is part of the random key, so only append
_CHUNK_ELEMENTS = 1 << 20  # 4 MiB of float32 stay in a CPU's cache; eight times as many take 1.5 times as long
_ACCELERATOR_ELEMENTS = 1 << 26  # 256 MiB: each chunk waits for the device once, and small ones don't fill it
_BLOCK = 32
_UNDERFLOW = -104.0  # exp of anything lower is 0 in float32


class PositionSignals(NamedTuple):
    """The stored part of the distributions at N positions."""

    ids_M: np.ndarray  # int64: distinct ids, position after position, ascending within one
    amounts_M: np.ndarray  # int64: how often each was drawn; or float32: its probability
    ids_per_position_N: np.ndarray  # int64
    entropy_N: np.ndarray  # float32, nats, at temperature 1; a lower bound if there is entropy_high_N
    confidence_N: np.ndarray  # float32: the largest probability at temperature 1
    next_logprob_N: np.ndarray  # float32: the label's log-probability; nan where there is no label
    temperature_entropy_N: np.ndarray  # float32, nats, at the drawing temperature
    entropy_high_N: np.ndarray | None = None  # float32: upper bound, for a server that does not give the entropy


def row_uniforms(seed: int, split: str, row: int, row_length: int, draws: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) for one row's draws, ascending at each position.

    Args:
        seed: the capture's seed, below 2**63.
        split: "train" or "validation".
        row: the row's number in its split.
        row_length: positions in a row.
        draws: numbers for each position.

    Returns:
        (row_length, draws) float64. They are sorted, because draws have no order, and tokens drawn in ascending order
        need no sorting to be counted.
    """
    key = np.array([seed, (SPLITS.index(split) << 56) + row], np.uint64)
    # The upper 53 bits of Philox's raw numbers. NumPy promises never to change those, unlike its Generator's output.
    uniforms = (np.random.Philox(key=key).random_raw((row_length, draws)) >> np.uint64(11)) * 2.0**-53
    uniforms.sort(axis=1)
    return uniforms


def draw_tokens(weights_CV: torch.Tensor, uniforms_Cn: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution: return the token at which it passes each uniform number.

    This takes two steps with running sums in float64: first the block of 32 tokens, then the token within it. In
    float32 a sum over 32,000 tokens would never reach its rarest ones, and one long float64 sum takes six times as
    long.

    Args:
        weights_CV: (C, V) float32 >= 0, each row with a positive sum; need not be normalised.
        uniforms_Cn: (C, n) float64 in [0, 1).

    Returns:
        (C, n) int64 tokens, each of positive weight; ascending in a row if the uniforms are.
    """
    import torch

    if missing := -weights_CV.shape[1] % _BLOCK:
        weights_CV = torch.nn.functional.pad(weights_CV, (0, missing))
    blocks_CGb = weights_CV.unflatten(1, (-1, _BLOCK))
    ends_CG = blocks_CGb.sum(-1).double().cumsum(-1)
    target_Cn = uniforms_Cn * ends_CG[:, -1:]  # below the total: (1 - 2^-53) t never rounds up to t
    block_Cn = torch.searchsorted(ends_CG, target_Cn, right=True)
    start_Cn = torch.nn.functional.pad(ends_CG, (1, 0)).gather(1, block_Cn)
    chunk_row_C1 = torch.arange(len(weights_CV), device=weights_CV.device)[:, None]
    inner_Cnb = blocks_CGb[chunk_row_C1, block_Cn].double().cumsum(-1)
    # The block's sum in float32 may be above its last running sum, after which there is no token.
    rest_Cn = torch.minimum(target_Cn - start_Cn, torch.nextafter(inner_Cnb[:, :, -1], ends_CG.new_zeros(())))
    return block_Cn * _BLOCK + torch.searchsorted(inner_Cnb, rest_Cn[:, :, None], right=True)[:, :, 0]


def count_distinct(tokens_Nn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct tokens of each row and how often each occurs.

    Args:
        tokens_Nn: (N, n) int64, ascending in each row.

    Returns:
        ids_M and counts_M, row after row, and ids_per_position_N.
    """
    begins_Nn = np.ones(tokens_Nn.shape, bool)
    np.not_equal(tokens_Nn[:, 1:], tokens_Nn[:, :-1], out=begins_Nn[:, 1:])
    begin_M = np.flatnonzero(begins_Nn)
    counts_M = np.diff(begin_M, append=tokens_Nn.size)
    return tokens_Nn.reshape(-1)[begin_M], counts_M, begins_Nn.sum(1)


def position_signals(
    logits: torch.Tensor,
    places_N: np.ndarray,
    labels_N: np.ndarray,
    uniforms_Nn: np.ndarray | None,
    vocabulary_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> PositionSignals:
    """Reduce a teacher's logits to its signals, chunk by chunk, without a second tensor of their size.

    Args:
        logits: (..., V' >= vocabulary_size), any float type and device; ids outside the vocabulary are ignored.
        places_N: (N,) int64, the wanted positions in the flattened leading axes.
        labels_N: (N,) int64, the actual next token or -100.
        uniforms_Nn: (N, n) float64, from `row_uniforms`; None keeps the likeliest tokens instead of draws.
        vocabulary_size: V.
        temperature: the temperature of the distribution that tokens are drawn from.
        top_k: how many of the likeliest tokens to keep; None keeps all.

    Raises:
        FloatingPointError: a position's logits hold nan or +inf, or only -inf.
    """
    import torch

    flat = logits.flatten(0, -2)
    device = "cpu" if logits.device.type == "mps" else logits.device  # MPS has no float64
    draws = 0 if uniforms_Nn is None else uniforms_Nn.shape[1]
    rows = max(1, _elements(torch.device(device)) // max(vocabulary_size, draws * _BLOCK))
    places = torch.from_numpy(places_N).to(flat.device)
    labels = torch.from_numpy(labels_N).to(device)
    uniforms = None if uniforms_Nn is None else torch.from_numpy(uniforms_Nn).to(device)
    chunks = []
    for begin in range(0, len(places_N), rows):
        part = slice(begin, begin + rows)
        shifted_CV = flat.index_select(0, places[part])[:, :vocabulary_size].to(device, torch.float32)
        exact = _exact_figures(shifted_CV, labels[part], temperature)
        if uniforms is None:
            kept = likeliest_tokens(exact.weights_CV, top_k or vocabulary_size)
        else:
            kept = (draw_tokens(exact.weights_CV, uniforms[part]),)
        chunks.append((*exact[1:], *kept))
    *figures, ids_Nn = (torch.cat(column).cpu().numpy() for column in zip(*(c[:5] for c in chunks), strict=True))
    if uniforms_Nn is not None:
        return PositionSignals(*count_distinct(ids_Nn), *figures)
    probs_Nk = torch.cat([chunk[5] for chunk in chunks]).cpu().numpy()
    return PositionSignals(ids_Nn.reshape(-1), probs_Nk.reshape(-1), np.full(*ids_Nn.shape), *figures)


def _elements(device: torch.device) -> int:
    """Return how many logits a chunk has at most."""
    return _CHUNK_ELEMENTS if device.type == "cpu" else _ACCELERATOR_ELEMENTS


def likeliest_tokens(weights_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k tokens of greatest weight, ascending by id, and their probabilities.

    Args:
        weights_CV: (C, V) float32 >= 0, each row with a positive sum; need not be normalised.
        k: tokens to keep, at most V.

    Returns:
        (C, k) int64 ids and (C, k) float32 probabilities, which sum to 1 only if k is V.
    """
    ids_Ck = weights_CV.topk(k, sorted=False).indices.sort(-1).values
    return ids_Ck, weights_CV.gather(1, ids_Ck) / weights_CV.sum(-1, keepdim=True)


class _Exact(NamedTuple):
    """One chunk's figures, and the weights exp((z - max z) / temperature) to choose tokens by."""

    weights_CV: torch.Tensor
    entropy_C: torch.Tensor
    confidence_C: torch.Tensor
    next_logprob_C: torch.Tensor
    temperature_entropy_C: torch.Tensor


def _exact_figures(logits_CV: torch.Tensor, labels_C: torch.Tensor, temperature: float) -> _Exact:
    """Return the four exact figures of one chunk. The logits are overwritten."""
    import torch

    top_C1 = logits_CV.amax(-1, keepdim=True)
    if not torch.isfinite(top_C1).all():
        raise FloatingPointError("the teacher's logits are not finite")
    shifted_CV = logits_CV.sub_(top_C1)
    label_logit_C = shifted_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0]
    # 0 * -inf would be nan. A token that is excluded at temperature 1 stays excluded at others, so those use unclamped.
    clamped_CV = shifted_CV.clamp_(min=_UNDERFLOW) if temperature == 1.0 else shifted_CV.clamp(min=_UNDERFLOW)
    weights_CV = clamped_CV.exp()
    total_C = weights_CV.sum(-1)
    log_total_C = total_C.log()
    entropy_C = log_total_C - (weights_CV * clamped_CV).sum(-1) / total_C
    next_logprob_C = (label_logit_C - log_total_C).masked_fill(labels_C < 0, float("nan"))
    tempered_entropy_C = entropy_C
    if temperature != 1.0:
        weights_CV = torch.exp(shifted_CV.div_(temperature).clamp_(min=_UNDERFLOW), out=weights_CV)
        tempered_total_C = weights_CV.sum(-1)
        dot_C = (weights_CV * shifted_CV).sum(-1)
        tempered_entropy_C = tempered_total_C.log() - dot_C / tempered_total_C
    return _Exact(weights_CV, entropy_C, 1 / total_C, next_logprob_C, tempered_entropy_C)
