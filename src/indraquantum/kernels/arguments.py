"""What the fused linear objective takes and returns, and the checks that name a wrong argument.

Legend: N rows (token positions), D real width, V vocabulary, K kept teacher tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from indraquantum.errors import InvalidInput

IGNORE_INDEX = -100
PADDING_ID = -1
ROW_SUM_TOLERANCE = 1e-4  # room for probabilities that were rounded when they were stored
MISSING_MASS_FLOOR = 1e-6  # less missing mass than this is the float32 rounding of a full row, not a tail

Tail = Literal["none", "bucket", "uniform"]
TAILS: tuple[Tail, ...] = ("none", "bucket", "uniform")
Head = Literal["interference", "born"]
HEADS: tuple[Head, ...] = ("interference", "born")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is computed from the logits; the defaults give plain cross-entropy."""

    kd_weight: float = 0.0
    """Weight of the distillation term in the total. With 0 the term is still reported if signals are given."""
    temperature: float = 1.0
    """tau, which divides the student's logits in the distillation term; the term is multiplied by tau^2."""
    tail: Tail = "none"
    """How to treat the mass that a row's ids do not hold: leave it out, one bucket, or spread it over other tokens."""
    head: Head = "interference"
    """How the logits are made: scale * states @ table.T + bias, or Born's rule, which is dense (kernels/born.py)."""

    def __post_init__(self) -> None:
        require(self.kd_weight >= 0, "kd_weight", self.kd_weight, "0 or more")
        require(0 < self.temperature < float("inf"), "temperature", self.temperature, "above 0 and finite")
        require(self.tail in TAILS, "tail", self.tail, f"one of {', '.join(TAILS)}")
        require(self.head in HEADS, "head", self.head, f"one of {', '.join(HEADS)}")


class LinearInputs(NamedTuple):
    """Checked tensors of one call; logits_NV = scale * states_ND @ table_VD.T + bias_V."""

    states_ND: Tensor
    table_VD: Tensor
    labels_N: Tensor  # next token, IGNORE_INDEX where the row counts in no term
    bias_V: Tensor | None
    scale: Tensor | None  # 0-d
    signal_ids_NK: Tensor | None  # teacher's tokens, PADDING_ID where unused; duplicates add up
    signal_probs_NK: Tensor | None  # their probabilities
    token_count: float  # divides every sum


class ObjectiveResult(NamedTuple):
    """Each term is a sum over rows divided by the token count."""

    total: Tensor  # ce + kd_weight * kd; the only one that carries a gradient
    ce: Tensor
    kd: Tensor | None  # tau^2 * sum q (ln q - ln p); None without signals
    kd_cross_entropy: Tensor | None  # tau^2 * sum -q ln p


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raise InvalidInput with the argument, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise InvalidInput(argument, value, f"must be {allowed}")


def require_shape(argument: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless `tensor` has exactly `shape`; `letters` names its axes."""
    require(tuple(tensor.shape) == shape, argument, f"shape {tuple(tensor.shape)}", f"{letters} = {shape}")


def require_floating(argument: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds real floating-point numbers."""
    require(tensor.is_floating_point(), argument, f"dtype {tensor.dtype}", "a real floating-point dtype")


def require_integer(argument: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds integers."""
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    require(is_integer, argument, f"dtype {tensor.dtype}", "an integer dtype")


def check_linear(states_ND: Tensor, table_VD: Tensor, labels_N: Tensor) -> None:
    """Check the shapes and dtypes of states, table and labels, and that labels are in the vocabulary.

    Raises:
        ValueError: something is wrong; the message names the argument, its value and the allowed range.
    """
    require(states_ND.ndim == 2, "states_ND", f"shape {tuple(states_ND.shape)}", "two-dimensional (N, D)")
    require(table_VD.ndim == 2, "table_VD", f"shape {tuple(table_VD.shape)}", "two-dimensional (V, D)")
    require(table_VD.shape[0] > 0, "table_VD", f"shape {tuple(table_VD.shape)}", "at least one row (V >= 1)")
    num_rows, width = states_ND.shape
    require_shape("table_VD", table_VD, (table_VD.shape[0], width), "(V, D)")
    require_floating("states_ND", states_ND)
    require_floating("table_VD", table_VD)
    require_shape("labels_N", labels_N, (num_rows,), "(N,)")
    require_integer("labels_N", labels_N)
    vocabulary_size = table_VD.shape[0]
    wrong_N = ((labels_N < 0) | (labels_N >= vocabulary_size)) & (labels_N != IGNORE_INDEX)
    if wrong_N.any():
        allowed = f"in [0, {vocabulary_size}), or {IGNORE_INDEX} to ignore the row"
        require(False, "labels_N", labels_N[wrong_N][0].item(), allowed)


def check_signals(ids_NK: Tensor, probs_NK: Tensor, num_rows: int, vocabulary_size: int) -> None:
    """Check ids and probabilities of the teacher's tokens. Probabilities at padding ids are ignored.

    Raises:
        ValueError: as in `check_linear`; also if a row's probabilities sum to more than 1.
    """
    require(ids_NK.ndim == 2, "ids_NK", f"shape {tuple(ids_NK.shape)}", "two-dimensional (N, K)")
    require_shape("ids_NK", ids_NK, (num_rows, ids_NK.shape[1]), "(N, K)")
    require_shape("probs_NK", probs_NK, tuple(ids_NK.shape), "(N, K) as ids_NK")
    require_integer("ids_NK", ids_NK)
    require_floating("probs_NK", probs_NK)
    wrong_NK = (ids_NK < PADDING_ID) | (ids_NK >= vocabulary_size)
    if wrong_NK.any():
        allowed = f"in [0, {vocabulary_size}), or {PADDING_ID} for padding"
        require(False, "ids_NK", ids_NK[wrong_NK][0].item(), allowed)
    known_NK = probs_NK.masked_fill(ids_NK < 0, 0.0)
    wrong_NK = ~((known_NK >= 0) & (known_NK <= 1 + ROW_SUM_TOLERANCE))  # so written, NaN is wrong too
    if wrong_NK.any():
        require(False, "probs_NK", known_NK[wrong_NK][0].item(), "a probability in [0, 1]")
    sums_N = known_NK.float().sum(dim=1)
    if num_rows and (largest := sums_N.max().item()) > 1 + ROW_SUM_TOLERANCE:
        allowed = f"at most 1 for each row, within {ROW_SUM_TOLERANCE}"
        require(False, "probs_NK", f"a row that sums to {largest:.6g}", allowed)


def check_inputs(
    states_ND: Tensor,
    table_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None,
    scale: Tensor | float | None,
    signal_ids_NK: Tensor | None,
    signal_probs_NK: Tensor | None,
    token_count: float | None,
) -> LinearInputs:
    """Check everything and fill in defaults; see `fused_linear_objective` for the arguments."""
    check_linear(states_ND, table_VD, labels_N)
    num_rows, vocabulary_size = states_ND.shape[0], table_VD.shape[0]
    if bias_V is not None:
        require_shape("bias_V", bias_V, (vocabulary_size,), "(V,)")
        require_floating("bias_V", bias_V)
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=None if isinstance(scale, Tensor) else states_ND.dtype)
        require(scale.numel() == 1, "scale", f"shape {tuple(scale.shape)}", "one number")
        require_floating("scale", scale)
        scale = scale.to(states_ND.device).reshape(())
    require((signal_ids_NK is None) == (signal_probs_NK is None), "ids_NK", "only one", "given with probs_NK")
    if signal_ids_NK is not None and signal_probs_NK is not None:
        check_signals(signal_ids_NK, signal_probs_NK, num_rows, vocabulary_size)
    if token_count is None:
        token_count = max(1, int((labels_N != IGNORE_INDEX).sum()))
    require(0 < token_count < float("inf"), "token_count", token_count, "above 0 and finite")
    return LinearInputs(
        states_ND, table_VD, labels_N.long(), bias_V, scale,
        None if signal_ids_NK is None else signal_ids_NK.long(), signal_probs_NK, float(token_count),
    )  # fmt: skip
