"""A model's figures on held-out text: prediction, calibration, and how its state agrees with the teacher.

Calibration error and correlation are a few lines each, so no library of metrics is needed for them.

Legend: N labelled positions, D real width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from indraquantum.data.split import Split
from indraquantum.device import widest_float
from indraquantum.evaluation.held_out import LOGIT_ROWS, batches, evaluation_fits, perplexity
from indraquantum.kernels.onednn import onednn_products
from indraquantum.learner import Learner, labelled_positions, to_tensors
from indraquantum.model.readout import wrapped_phase
from indraquantum.teacher.signals import SignalStore

CALIBRATION_BINS = 15
CPU_ROWS = 16  # positions whose probabilities a CPU computes at a time: 4 MB in float64 with 32,000 tokens
MOST_FREQUENT = 4  # the last band of frequencies begins at 10 to this power


class Predictions(NamedTuple):
    """A model's predictions at every labelled position of a split, in row order."""

    loss_N: np.ndarray  # float64, nats: -ln p(next token)
    confidence_N: np.ndarray  # max p
    entropy_N: np.ndarray  # nats
    correct_N: np.ndarray  # bool: the likeliest token was right
    labels_N: np.ndarray  # the next token
    magnitude_N: np.ndarray  # |c|; NaN if the model has no readout
    phase_N: np.ndarray  # arg c, radians in (-pi/2, 3pi/2]; NaN if the model has no readout
    sources_N: np.ndarray  # number of the position's source
    index_N: np.ndarray  # its place as signals are stored


@dataclass(frozen=True)
class Figures:
    """Figures of one source, or of all sources."""

    tokens: int  # predicted
    cross_entropy: float  # nats per token
    perplexity: float
    bits_per_byte: float  # of the predicted bytes, including EOS; NaN if no byte is predicted
    accuracy: float  # share of positions where the likeliest token was right
    calibration_error: float  # ECE of the likeliest token, 15 bins of equal width (arXiv 1706.04599)


@dataclass(frozen=True)
class Alignment:
    """Pearson correlations with the teacher's signals over the positions that have them; NaN without a readout.

    The student's own softmax is the control: a useful readout agrees with the teacher better than the softmax does.
    """

    positions: int
    magnitude_confidence: float  # |c| with the teacher's confidence
    phase_entropy: float  # arg c with the teacher's entropy
    softmax_confidence: float  # the student's max p with the teacher's confidence
    softmax_entropy: float  # the student's entropy with the teacher's entropy


@dataclass(frozen=True)
class Band:
    """The loss on tokens that are about equally frequent in the training text."""

    tokens: int  # predicted
    cross_entropy: float  # nats per token


@dataclass(frozen=True)
class Evaluation:
    """Everything that `indra eval` reports."""

    sources: dict[str, Figures]  # by source, and `all`
    bands: dict[str, Band] | None  # by how often the token occurs in the training text; None without training text
    alignment: Alignment | None  # None without signals
    parameters: int
    tokens_per_second: float


def predict(learner: Learner, split: Split, device: torch.device) -> Predictions:
    """Return the predictions of `learner`, in evaluation mode, on all rows of `split`."""
    with onednn_products(device), torch.inference_mode():
        table_VD = learner.lift_table()
        parts = []
        for batch in batches(split):
            states_BTD = learner.hidden_states(**to_tensors(batch, device), table_VD=table_VD)
            states_ND, labels_N = labelled_positions(states_BTD, batch)
            softmax = _softmax_readings(learner, states_ND, labels_N, table_VD)
            readout = _state_readings(learner, states_ND)
            places = batch.sources[batch.labelled], batch.index[batch.labelled]
            parts.append((*softmax, labels_N.cpu().numpy(), *readout, *places))
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def evaluate(
    learner: Learner,
    split: Split,
    source_bytes: dict[str, int],
    device: torch.device,
    signals: SignalStore | None = None,
    counts_V: np.ndarray | None = None,
) -> Evaluation:
    """Measure `learner` on `split`.

    Args:
        learner: the model, in evaluation mode.
        split: the split to predict; with signals, a dataset's validation split.
        source_bytes: UTF-8 bytes of the documents of each source, in the order of the sources' numbers.
        device: the device of the model.
        signals: the teacher's signals, to compare the readouts with.
        counts_V: how often the training text has each token.

    Raises:
        OutOfMemory: the evaluation does not fit into the memory of the device.
    """
    start = time.perf_counter()
    with evaluation_fits(device):
        found = predict(learner, split, device)
    seconds = time.perf_counter() - start
    alignment = None if signals is None else alignment_with(found, signals)
    parameters = sum(p.numel() for p in learner.parameters())
    bands = None if counts_V is None else frequency_bands(found, counts_V)
    sources = figures_by_source(found, source_bytes)
    return Evaluation(sources, bands, alignment, parameters, split.num_tokens / seconds)


def figures_by_source(found: Predictions, source_bytes: dict[str, int]) -> dict[str, Figures]:
    """Return the figures of each source that has positions, and of `all`; `source_bytes` as for `evaluate`."""
    sources = {}
    for number, (name, size) in enumerate(source_bytes.items()):
        if (here_N := found.sources_N == number).any():
            sources[name] = _figures(found, here_N, size)
    return sources | {"all": _figures(found, np.ones_like(found.correct_N), sum(source_bytes.values()))}


def frequency_bands(found: Predictions, counts_V: np.ndarray) -> dict[str, Band]:
    """Return the loss on tokens that never occur in the training text, occur 1 to 9 times, 10 to 99 times, and so on.

    Args:
        found: the predictions.
        counts_V: how often the training text has each token.
    """
    counts_N = counts_V[found.labels_N]
    edges = (0, *(10**power for power in range(MOST_FREQUENT + 1)))
    names = ["0", *(f"{low:,} to {10 * low - 1:,}" for low in edges[1:-1]), f"{edges[-1]:,} or more"]
    bands = {}
    for name, low, high in zip(names, edges, [*edges[1:], np.inf], strict=True):
        if (here_N := (counts_N >= low) & (counts_N < high)).any():
            bands[name] = Band(int(here_N.sum()), float(found.loss_N[here_N].mean()))
    return bands


def expected_calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width, weighted by their positions.

    Args:
        confidence_N: probability of the likeliest token, in [0, 1].
        correct_N: whether it was right.
        bins: number of bins.
    """
    gaps = np.bincount(bins_of(confidence_N, bins), confidence_N - correct_N, bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


def bins_of(share_N: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Return the bin of each share in [0, 1]: (0, 1/bins] is bin 0, (1/bins, 2/bins] bin 1, and so on."""
    return np.clip(np.ceil(share_N * bins).astype(int) - 1, 0, bins - 1)


def pearson(left_N: np.ndarray, right_N: np.ndarray) -> float:
    """Return the Pearson correlation; NaN if one side is constant, empty or unknown."""
    if not len(left_N) or any((side_N == side_N[0]).all() for side_N in (left_N, right_N)):
        return math.nan  # not by the norm: a mean is rounded, so a constant's distances from it need not be 0
    left_N, right_N = left_N - left_N.mean(), right_N - right_N.mean()
    norm = math.sqrt(float(left_N @ left_N) * float(right_N @ right_N))
    return float(left_N @ right_N) / norm if norm > 0 else math.nan


def _softmax_readings(
    learner: Learner, states_ND: torch.Tensor, labels_N: torch.Tensor, table_VD: torch.Tensor
) -> tuple[np.ndarray, ...]:
    columns: list[tuple[torch.Tensor, ...]] = []
    rows = CPU_ROWS if states_ND.device.type == "cpu" else LOGIT_ROWS
    for states_nD, labels_n in zip(states_ND.split(LOGIT_ROWS), labels_N.split(LOGIT_ROWS), strict=True):
        logits_nV = learner.logits(states_nD, table_VD)
        columns += map(_readings_of_logits, logits_nV.split(rows), labels_n.split(rows))
    return tuple(torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))


def _readings_of_logits(logits_nV: torch.Tensor, labels_n: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return loss, confidence, entropy (nats) and whether the likeliest token is right, each (n,)."""
    logits_nV = logits_nV.to(widest_float(logits_nV.device), copy=True)
    top_n, choice_n = logits_nV.max(dim=-1)
    below_nV = logits_nV.sub_(top_n[:, None])  # in place: memory for another copy costs as much as the arithmetic
    label_n = below_nV.gather(1, labels_n[:, None])[:, 0]
    odds_nV = below_nV.exp()
    sum_n = odds_nV.sum(-1)
    entropy_n = sum_n.log() - torch.einsum("nv,nv->n", odds_nV, below_nV) / sum_n
    return sum_n.log() - label_n, 1 / sum_n, entropy_n, choice_n == labels_n


def _state_readings(learner: Learner, states_ND: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    amplitude_N = learner.amplitude(states_ND)
    if amplitude_N is None:
        unknown = np.full(len(states_ND), np.nan)
        return unknown, unknown
    return amplitude_N.abs().cpu().double().numpy(), wrapped_phase(amplitude_N.angle()).cpu().double().numpy()


def _figures(found: Predictions, here_N: np.ndarray, size: int) -> Figures:
    loss_N = found.loss_N[here_N]
    return Figures(
        tokens=len(loss_N),
        cross_entropy=float(loss_N.mean()),
        perplexity=perplexity(float(loss_N.mean())),
        bits_per_byte=float(loss_N.sum()) / math.log(2) / size if size else math.nan,
        accuracy=float(found.correct_N[here_N].mean()),
        calibration_error=expected_calibration_error(found.confidence_N[here_N], found.correct_N[here_N]),
    )


def alignment_with(found: Predictions, signals: SignalStore) -> Alignment:
    """Return how predictions at a dataset's held-out positions correlate with the teacher's exact figures there."""
    teacher = signals.batch("validation", found.index_N)
    known_N = (teacher.ids_NK >= 0).any(dim=1).numpy()
    assert teacher.entropy_N is not None  # a served teacher's signals are refused before
    assert teacher.confidence_N is not None
    entropy_N, confidence_N = (part.double().numpy()[known_N] for part in (teacher.entropy_N, teacher.confidence_N))
    return Alignment(
        positions=int(known_N.sum()),
        magnitude_confidence=pearson(found.magnitude_N[known_N], confidence_N),
        phase_entropy=pearson(found.phase_N[known_N], entropy_N),
        softmax_confidence=pearson(found.confidence_N[known_N], confidence_N),
        softmax_entropy=pearson(found.entropy_N[known_N], entropy_N),
    )
