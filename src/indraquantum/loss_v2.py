"""The unified objective of semantic distillation: `CE + w_kd * KD + w_phase * L_phase + w_mag * L_mag`.

Cross-entropy and distillation come from the fused linear objective, which never builds the logits. The two alignment
terms tie the student's quantum state to the teacher: its phase to how uncertain the teacher is, and its magnitude to
how confident it is.

Legend: N rows (token positions), R those with a label and signals, D real width, V vocabulary, K kept teacher
tokens of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from indraquantum.kernels import Implementation, ObjectiveOptions, ObjectiveResult, fused_linear_objective
from indraquantum.kernels.arguments import IGNORE_INDEX, Head, Tail, require, require_floating, require_shape

CUT_OFF = 1e-3  # probability that a row of signals lacks, beyond the rounding of 16-bit numbers
_PHASE_EPSILON = 1e-6  # keeps the direction's gradient finite where the amplitude is 0


class TeacherSignals(NamedTuple):
    """The teacher's signals at each row. A row whose ids are all -1 has no signals."""

    ids_NK: Tensor  # integer; -1 is padding, duplicates add up
    probs_NK: Tensor  # counts / draws, or probabilities; a row sums to at most 1
    entropy_N: Tensor | None = None  # nats, exact, at temperature 1
    confidence_N: Tensor | None = None  # max p, exact, at temperature 1
    # nats, exact, at the distillation temperature if that is not 1; without it there is no kd_estimate then
    temperature_entropy_N: Tensor | None = None

    def to(self, device: torch.device) -> TeacherSignals:
        """The same signals on `device`."""
        others = (None if part is None else part.to(device) for part in self[2:])
        return TeacherSignals(self.ids_NK.to(device), self.probs_NK.to(device), *others)


class LossTerms(NamedTuple):
    """The objective and its parts: sums over rows divided by the token count, unweighted; None if absent."""

    total: Tensor  # differentiable; all others are detached
    ce: Tensor  # nats
    kd: Tensor | None  # tau^2 * sum q (ln q - ln p): the divergence from the signals as given
    # tau^2 * (sum -q ln p - H): unbiased for the true divergence if q was sampled, and may dip below 0. NaN if q is cut
    # off, such as the likeliest tokens alone.
    kd_estimate: Tensor | None
    phase: Tensor | None  # 1 - cos of the angle to the target, in [0, 2]
    magnitude: Tensor | None  # squared error of |c|


class SemanticDistillationLoss:
    """Cross-entropy, distillation and the alignment of phase and magnitude in one call.

    The weights are plain attributes: a curriculum sets `kd_weight`, `phase_weight`, `magnitude_weight`.
    """

    def __init__(
        self,
        kd_weight: float = 0.05,
        phase_weight: float = 0.0,
        magnitude_weight: float = 0.0,
        temperature: float = 1.0,
        *,
        tail: Tail = "bucket",
        head: Head = "interference",
        implementation: Implementation = "auto",
    ) -> None:
        """Set weights and options; each is checked when the objective is called.

        Args:
            kd_weight: weight of the distillation term.
            phase_weight: weight of the phase term.
            magnitude_weight: weight of the magnitude term.
            temperature: tau of the distillation term, which is multiplied by tau^2. It must be the temperature at which
                the signals were captured.
            tail: what to do with the probability that the signals do not hold, for example if they hold only the
                likeliest tokens. `bucket` treats all other tokens as one outcome. `uniform` spreads the probability
                evenly over them. `none` leaves it out, which teaches the student to give them nothing. Signals whose
                rows sum to 1 have no tail, and all three are equally fast for them.
            head: how logits are made from states and table: interference, which is fused, or born, which is dense.
            implementation: "auto" picks the kernel by the device. Give "reference" to compare a result with the plain
                formulas, which build the whole N x V logits.
        """
        self.kd_weight = kd_weight
        self.phase_weight = phase_weight
        self.magnitude_weight = magnitude_weight
        self.temperature = temperature
        self.tail: Tail = tail
        self.head: Head = head
        self.implementation: Implementation = implementation
        self._options()

    def __call__(
        self,
        states_ND: Tensor,
        table_VD: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None = None,
        scale: Tensor | float | None = None,
        signals: TeacherSignals | None = None,
        amplitude_N: Tensor | None = None,
        token_count: float | None = None,
        vocabulary_size: int | None = None,
    ) -> LossTerms:
        """Compute all terms whose inputs are given. A term of weight 0 is reported, but not in the total.

        Args:
            states_ND: the head's input.
            table_VD: the lifted vocabulary; logits are `scale * states @ table.T + bias`, or by Born's rule.
            labels_N: the next token, or -100 for a row that counts in no term.
            bias_V: added to the logits.
            scale: multiplies the inner products.
            signals: the teacher's signals; a row without any id counts in cross-entropy only.
            amplitude_N: complex readout c: |c| is the magnitude, its angle the phase.
            token_count: labelled tokens of the whole optimiser step, which divides every term, so that
                accumulated and distributed steps add up; by default the labelled rows of this call.
            vocabulary_size: V, if the table holds only a part of the vocabulary.

        Returns:
            The terms; `total` carries the gradient.

        Raises:
            ValueError: an argument is wrong, a positive weight lacks its inputs, or the temperature is 1 and that of
                the signals is not.
        """
        options = self._options()
        self._require_inputs(signals, amplitude_N)
        if token_count is None:
            token_count = max(1, int((labels_N != IGNORE_INDEX).sum()))
        objective = fused_linear_objective(
            states_ND, table_VD, labels_N,
            bias_V=bias_V, scale=scale, token_count=token_count, options=options,
            signal_ids_NK=None if signals is None else signals.ids_NK,
            signal_probs_NK=None if signals is None else signals.probs_NK,
            implementation=self.implementation,
        )  # fmt: skip
        terms = LossTerms(objective.total, objective.ce, objective.kd, None, None, None)
        if signals is None:
            return terms
        _check_alignment(signals, amplitude_N, labels_N)
        # Only these rows are read, so that values in the others, even NaN, have no effect.
        rows_R = ((labels_N != IGNORE_INDEX) & (signals.ids_NK >= 0).any(dim=1)).nonzero().squeeze(1)
        terms = terms._replace(kd_estimate=self._kd_estimate(objective, signals, rows_R, token_count))
        if amplitude_N is None:
            return terms
        total, amplitude_R = terms.total, amplitude_N[rows_R]
        if signals.entropy_N is not None:
            size = table_VD.shape[0] if vocabulary_size is None else vocabulary_size
            phase = phase_loss(amplitude_R, signals.entropy_N[rows_R], size) / token_count
            total = total + self.phase_weight * phase
            terms = terms._replace(phase=phase.detach())
        if signals.confidence_N is not None:
            magnitude = magnitude_loss(amplitude_R, signals.confidence_N[rows_R]) / token_count
            total = total + self.magnitude_weight * magnitude
            terms = terms._replace(magnitude=magnitude.detach())
        return terms._replace(total=total)

    def _options(self) -> ObjectiveOptions:
        """Return the kernel's options; raise if an attribute is out of range."""
        require(self.phase_weight >= 0, "phase_weight", self.phase_weight, "0 or more")
        require(self.magnitude_weight >= 0, "magnitude_weight", self.magnitude_weight, "0 or more")
        return ObjectiveOptions(kd_weight=self.kd_weight, temperature=self.temperature, tail=self.tail, head=self.head)

    def _require_inputs(self, signals: TeacherSignals | None, amplitude_N: Tensor | None) -> None:
        """Refuse a positive weight whose inputs are absent, so that no term is dead without notice.

        Also refuse to compare the student at temperature 1 with a teacher at another one.
        """
        entropy_N = None if signals is None else signals.entropy_N
        confidence_N = None if signals is None else signals.confidence_N
        for name, weight, needed in (
            ("kd_weight", self.kd_weight, {"signals": signals}),
            ("phase_weight", self.phase_weight, {"signals.entropy_N": entropy_N, "amplitude_N": amplitude_N}),
            ("magnitude_weight", self.magnitude_weight,
             {"signals.confidence_N": confidence_N, "amplitude_N": amplitude_N}),
        ):  # fmt: skip
            absent = [argument for argument, value in needed.items() if value is None]
            require(not (weight and absent), name, weight, f"0 where there is no {' and no '.join(absent)}")
        is_tempered = signals is not None and signals.temperature_entropy_N is not None
        allowed = "the temperature of the signals, which is not 1 because they have temperature_entropy_N"
        require(not (is_tempered and self.temperature == 1), "temperature", self.temperature, allowed)

    def _kd_estimate(
        self, objective: ObjectiveResult, signals: TeacherSignals, rows_R: Tensor, token_count: float
    ) -> Tensor | None:
        """Return `kd` with the teacher's exact entropy at the temperature instead of the signals' own."""
        entropy_N = signals.entropy_N if self.temperature == 1 else signals.temperature_entropy_N
        if entropy_N is None or objective.kd_cross_entropy is None:
            return None
        probs_RK = signals.probs_NK[rows_R].masked_fill(signals.ids_NK[rows_R] < 0, 0)
        is_cut = (probs_RK.sum(dim=1) < 1 - CUT_OFF).any()
        entropy = entropy_N[rows_R].to(objective.kd_cross_entropy).sum() / token_count
        estimate = objective.kd_cross_entropy - self.temperature**2 * entropy
        return estimate.masked_fill(is_cut, math.nan)  # no branch, for which a GPU would have to be waited for


def phase_loss(amplitude_R: Tensor, entropy_R: Tensor, vocabulary_size: int) -> Tensor:
    """Circular distance of the angle to `pi * H / ln V`, which is 0 for a certain teacher and pi for a uniform one.

    Args:
        amplitude_R: complex readout c of the rows that count.
        entropy_R: the teacher's exact entropy at temperature 1, nats.
        vocabulary_size: V.

    Returns:
        Scalar: the sum of `1 - cos(angle - target)`, each in [0, 2].
    """
    target_R = math.pi * entropy_R.to(amplitude_R.real.dtype) / math.log(max(vocabulary_size, 2))
    aligned_R = amplitude_R.real * target_R.cos() + amplitude_R.imag * target_R.sin()
    squared_R = amplitude_R.real.square() + amplitude_R.imag.square()
    return (1 - aligned_R / (squared_R + _PHASE_EPSILON).sqrt()).sum()


def magnitude_loss(amplitude_R: Tensor, confidence_R: Tensor) -> Tensor:
    """Squared error of the amplitude's magnitude against the teacher's confidence.

    Args:
        amplitude_R: complex readout c of the rows that count; complex `abs` has a finite gradient at 0.
        confidence_R: the teacher's exact largest probability at temperature 1.

    Returns:
        Scalar: the sum of `(|c| - confidence)^2`.
    """
    magnitude_R = amplitude_R.abs()
    return (magnitude_R - confidence_R.to(magnitude_R.dtype)).square().sum()


def _check_alignment(signals: TeacherSignals, amplitude_N: Tensor | None, labels_N: Tensor) -> None:
    """Check the signals' row values and the amplitude; those that are absent are skipped."""
    for argument in ("entropy_N", "confidence_N", "temperature_entropy_N"):
        values_N = getattr(signals, argument)
        if values_N is not None:
            require_shape(argument, values_N, tuple(labels_N.shape), "(N,)")
            require_floating(argument, values_N)
    if amplitude_N is not None:
        require_shape("amplitude_N", amplitude_N, tuple(labels_N.shape), "(N,)")
        require(amplitude_N.is_complex(), "amplitude_N", f"dtype {amplitude_N.dtype}", "a complex dtype")
