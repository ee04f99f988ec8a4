"""The loss of labels and of a teacher's signals: the unified objective (loss_v2), which never builds the logits.

Legend: B batch, T positions, N = B*T, V vocabulary, D real width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from indraquantum.model.vocabulary import gathered

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
        device = states_BTD.device  # accelerate may have put the parts of the model on several

        def of_head() -> LossTerms:
            return objective(
                states_BTD.flatten(0, 1),
                table_VD.to(device),
                shift_labels_BT.flatten().to(device),
                bias_V=None if self.bias_V is None else self.bias_V.to(device),
                scale=self.scale,
                signals=None if signals is None else signals.to(device),
                amplitude_N=amplitude_BT.flatten().to(device),
                # A step without any label has a loss of 0, here as elsewhere.
                token_count=None if num_items_in_batch is None else max(1.0, float(num_items_in_batch)),
            )

        with _readable(self.head):
            return gathered(self.head, of_head)


def _readable(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the weights of `module` can be read, also if accelerate has offloaded them."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _default_weights(signals: TeacherSignals | None) -> tuple[float, float, float]:
    """Return the weights of distillation, phase and magnitude at the end of v4; 0 for what the signals do not have."""
    if signals is None:
        return 0.0, 0.0, 0.0
    return 0.05, 0.1 * (signals.entropy_N is not None), 0.1 * (signals.confidence_N is not None)
