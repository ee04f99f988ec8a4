"""The readouts: one complex amplitude for each position, whose magnitude and phase are aligned to the teacher.

`reference`: c_t = <r, psi_t> against a learned reference state r. It leaves all other directions of psi to the tokens.
`mean`: the mean of |psi_j| and the mean of |arg psi_j| over all j, as a control. It has no parameters.

Legend: D real width (first half real parts, second half imaginary parts), R reference states; `_..D`
any leading axes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init  # transformers guards it where a checkpoint has brought the weights

from indraquantum.kernels.born import conjugate_turn

if TYPE_CHECKING:
    from indraquantum.model.shape import ModelShape


def wrapped_phase(phase: Tensor) -> Tensor:
    """Wrap phases (...) in radians into (-pi/2, 3pi/2]. Targets are in [0, pi], far from this cut of the circle."""
    return math.pi * 1.5 - torch.remainder(math.pi * 1.5 - phase, 2 * math.pi)


INITIAL_MAGNITUDE = 0.5  # the middle of the teacher's confidence, which is between 0 and 1


class ReferenceReadout(nn.Module):
    """c = <r, psi>, or with several references sum_k w_k <r_k, psi> with w = softmax_k |<r_k, psi>|^2.

    A plain average over k would again be a single reference, because <r, psi> is linear in r.
    """

    def __init__(self, config: ModelShape) -> None:
        super().__init__()
        self.references_RD = nn.Parameter(torch.empty(config.readout_references, config.hidden_size))

    def initialise(self) -> None:
        """Draw references so that |c| has mean 0.5 if psi has unit variance, as after the last norm.

        Re c and Im c then have standard deviation s sqrt(D), so |c| follows Rayleigh's law with mean s sqrt(D pi/2).
        """
        width = self.references_RD.shape[1]
        init.normal_(self.references_RD, std=INITIAL_MAGNITUDE / math.sqrt(width * math.pi / 2))

    def forward(self, states: Tensor) -> Tensor:
        """Return the complex64 amplitudes (...) of `states` (..., D)."""
        references_RD = self.references_RD.float()
        # Re<r, psi> = r . psi and Im<r, psi> = r . (-i psi) = (i r) . psi; conjugate_turn gives -i r.
        pairs_2RD = torch.cat([references_RD, -conjugate_turn(references_RD)])
        real, imaginary = F.linear(states.float(), pairs_2RD).chunk(2, dim=-1)
        if len(references_RD) == 1:
            return torch.complex(real[..., 0], imaginary[..., 0])
        weights = (real.square() + imaginary.square()).softmax(dim=-1)
        return torch.complex((weights * real).sum(-1), (weights * imaginary).sum(-1))


class MeanReadout(nn.Module):
    """c = mean_j |psi_j| * exp(i mean_j |arg psi_j|), with arg in (-pi, pi]."""

    def __init__(self, config: ModelShape) -> None:
        super().__init__()

    def forward(self, states: Tensor) -> Tensor:
        """Return the complex64 amplitudes (...) of `states` (..., D)."""
        psi = torch.complex(*states.float().chunk(2, dim=-1))
        # torch defines the gradients of a complex abs and angle at 0 as 0. hypot and atan2 would give NaN.
        return torch.polar(psi.abs().mean(-1), psi.angle().abs().mean(-1))


READOUTS: dict[str, type[ReferenceReadout | MeanReadout]] = {"reference": ReferenceReadout, "mean": MeanReadout}
