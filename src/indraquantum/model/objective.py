"""The loss of labels and of a teacher's signals: the unified objective (loss_v2), which never builds the logits.

Legend: B batch, T positions, N = B*T, V vocabulary, D real width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from indraquantum.loss_v2 import LossTerms, SemanticDistillationLoss, TeacherSignals

Signals: TypeAlias = "TeacherSignals | Mapping[str, Tensor]"
Objective: TypeAlias = "SemanticDistillationLoss"


class TrainingLoss:
    """A base class of IndraQuantumPhase2, which gives the loss of labels."""

    def _terms(
        self,
        states_BTD: Tensor,
        table_VD: Tensor,
        amplitude_BT: Tensor,
        shift_labels_BT: Tensor,
        signals: Signals | None,
        objective: Objective | None,
        num_items_in_batch: float | Tensor | None,
    ) -> LossTerms:
        from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals

        if isinstance(signals, Mapping):  # Trainer moves a dict to its device, but no NamedTuple
            signals = TeacherSignals(**signals)
        if objective is None:
            objective = SemanticDistillationLoss(*_default_weights(signals), head=self.config.head)
        if objective.head != self.config.head:
            raise ValueError(f"objective: its head is {objective.head}; must be the model's, {self.config.head}")
        return objective(
            states_BTD.flatten(0, 1),
            table_VD,
            shift_labels_BT.flatten().to(states_BTD.device),
            bias_V=self.bias_V,
            scale=self.scale,
            signals=signals,
            amplitude_N=amplitude_BT.flatten(),
            # A step without any label has a loss of 0, here as elsewhere.
            token_count=None if num_items_in_batch is None else max(1.0, float(num_items_in_batch)),
        )


def _default_weights(signals: TeacherSignals | None) -> tuple[float, float, float]:
    """Return the weights of distillation, phase and magnitude at the end of v4; 0 for what the signals do not have."""
    if signals is None:
        return 0.0, 0.0, 0.0
    return 0.05, 0.1 * (signals.entropy_N is not None), 0.1 * (signals.confidence_N is not None)
