"""The output head, a measurement: it gives how strongly the state psi interferes with each token's state Z_v.

Z_v is the projector's state, with the residual if there is one.

`interference`: logits_v = scale * Re<Z_v, psi> + bias_v; a model can be trained without the bias. On real pairs this is
a plain matrix product, so the fused objective (loss_v2) can compute it without building logits. In polar form it is
sum_j M_vj |psi_j| cos(P_vj - arg psi_j).
`born`: logits_v = ln(|scale * <Z_v, psi>|^2 + 1e-6) + bias_v, Born's rule. It is dense and for study: see
kernels/born.py.

Legend: V vocabulary, D real width (first half real parts, second half imaginary parts); `_..D` any leading
    axes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init  # transformers guards it where a checkpoint has brought the weights

from indraquantum.kernels.born import born_logits

if TYPE_CHECKING:
    from indraquantum.model.shape import ModelShape


class InterferenceHead(nn.Module):
    """Scale and bias of the tied head. The table is passed to each call, because it is lifted once in each step."""

    bias_V: nn.Parameter | None

    def __init__(self, config: ModelShape) -> None:
        super().__init__()
        self.width = config.hidden_size
        self.scale_1 = nn.Parameter(torch.empty(1))  # of one element, because FSDP2 takes no parameter without an axis
        bias_V = nn.Parameter(torch.empty(config.vocab_size)) if config.bias == "learned" else None
        self.register_parameter("bias_V", bias_V)

    def initialise(self) -> None:
        """Set the scale to 1/sqrt(D) and the bias to 0."""
        init.constant_(self.scale_1, 1 / math.sqrt(self.width))
        if self.bias_V is not None:
            init.zeros_(self.bias_V)

    def resize(self, vocab_size: int, mean: bool) -> None:
        """Change the length of the bias, if there is one. New tokens get the mean of the old ones (`mean`), or 0."""
        old_V = self.bias_V
        if old_V is None:
            return
        new = old_V.detach().mean() if mean else old_V.new_zeros(())
        bias_V = torch.cat([old_V.detach()[:vocab_size], new.expand(max(0, vocab_size - len(old_V)))])
        self.bias_V = nn.Parameter(bias_V, requires_grad=old_V.requires_grad)

    def forward(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D) against the lifted table (V, D)."""
        return F.linear(states * self.scale_1, table_VD, self.bias_V)


class BornHead(InterferenceHead):
    """Born's rule: the probability of a token is proportional to exp(bias_v) |<Z_v, psi>|^2."""

    def forward(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the log-probabilities up to a constant (..., V) of `states` (..., D)."""
        return born_logits(states, table_VD, self.bias_V, self.scale_1)


HEADS: dict[str, type[InterferenceHead]] = {"interference": InterferenceHead, "born": BornHead}
