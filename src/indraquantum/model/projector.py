"""The quantum projector, which turns token embeddings into states with magnitude and phase, and its controls.

A state Z = M exp(iP) in C^c is stored as real pairs [M cos P, M sin P] in R^D: the first half is the real part, the
second half the imaginary part. So a plain dot product of two states is Re<Z, psi>, and every kernel works on real
numbers.

The width d of the table and the complex width c of the states are settings of their own; by default they are equal.

Legend: d width of the table, c complex width, D = 2c real width, V vocabulary; `_..d` stands for any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init  # transformers guards it where a checkpoint has brought the weights

if TYPE_CHECKING:
    from indraquantum.model.shape import ModelShape


def uniform_by_fan_in(linear: nn.Linear, gain: float = 1.0) -> None:
    """Initialise `linear` as torch does by default, with `gain` times U(-1/sqrt(in), 1/sqrt(in)), and a bias of 0.

    transformers' own default, std 0.02 for any width, would put all phases near 0.
    """
    bound = gain / math.sqrt(linear.in_features)
    init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        init.zeros_(linear.bias)


# transformers skips modules without parameters of their own when it draws weights, such as a projector made
# of two layers: so each layer knows by itself how it starts.
class LiftLinear(nn.Linear):
    """A linear layer whose initial weights depend on the width of its inputs, times `gain`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__(inputs, outputs, bias)
        self.gain = gain

    def initialise(self) -> None:
        """Draw the initial weights."""
        uniform_by_fan_in(self, self.gain)


def _gain(config: ModelShape) -> float:
    """Return how large a lift begins. Beside a turned residual, which knows much already, it begins small."""
    return 0.1 if config.residual_head == "turned" else 1.0


class PhaseLinear(nn.Linear):
    """A linear layer whose outputs start with standard deviation `spread` (radians) for inputs of `input_std`."""

    def __init__(self, inputs: int, outputs: int, spread: float, input_std: float) -> None:
        super().__init__(inputs, outputs)
        self.initial_std = spread / (input_std * math.sqrt(inputs))

    def initialise(self) -> None:
        """Draw the initial weights."""
        init.normal_(self.weight, std=self.initial_std)
        init.zeros_(self.bias)


def _unchanged(magnitude: Tensor) -> Tensor:  # has a name, so that a model can be pickled
    return magnitude


MAGNITUDES: dict[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "exp": torch.exp, "linear": _unchanged}


class QuantumProjector(nn.Module):
    """Z = M exp(iP) with M = activation(E W_m + b_m) and P = E W_p + b_p, an unbounded angle.

    Softplus and exp keep M >= 0. A linear M may be negative, which turns the phase by pi. With phases near 0, the
    projector is then a linear lift that the phases bend.

    Args:
        config: gives d_model, complex_width, phase_spread, magnitude and table_std. `projector` "phase-only" fixes
            M = 1, and "frozen" keeps the projector's initial weights.
    """

    table_std = 1.0

    def __init__(self, config: ModelShape) -> None:
        super().__init__()
        self.magnitude_of = MAGNITUDES[config.magnitude]
        table_width, width = config.d_model, config.complex_width
        magnitude = None if config.projector == "phase-only" else LiftLinear(table_width, width, gain=_gain(config))
        self.magnitude = magnitude
        self.phase = PhaseLinear(table_width, width, config.phase_spread, config.table_std or self.table_std)
        self.requires_grad_(config.projector != "frozen")

    def polar(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return magnitudes and phases in radians, both (..., c), of `embeddings` (..., d)."""
        phase = self.phase(embeddings)
        if self.magnitude is None:
            return torch.ones_like(phase), phase
        return self.magnitude_of(self.magnitude(embeddings)), phase

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the states (..., D) of `embeddings` (..., d)."""
        if self.magnitude is None:
            phase = self.phase(embeddings)
            return torch.cat([phase.cos(), phase.sin()], dim=-1)
        return self.states(*self.polar(embeddings))

    def states(self, magnitude: Tensor, phase: Tensor) -> Tensor:
        """Return the states (..., D) of magnitudes and phases (..., c)."""
        return torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=-1)


class GatedProjector(QuantumProjector):
    """Control: (M, M P), which is a state of small phases to first order. Here P is not an angle but a gate of M."""

    def states(self, magnitude: Tensor, phase: Tensor) -> Tensor:
        """Return the pairs (..., D) of magnitudes and gates (..., c)."""
        return torch.cat([magnitude, magnitude * phase], dim=-1)


class LinearLift(nn.Module):
    """Control: E U, a linear lift to the same width D. Its logits have at most rank d."""

    table_std = 0.5

    def __init__(self, config: ModelShape) -> None:
        super().__init__()
        self.up = LiftLinear(config.d_model, config.hidden_size, bias=False, gain=_gain(config))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the lifted rows (..., D) of `embeddings` (..., d)."""
        return self.up(embeddings)


class MLPLift(LinearLift):
    """Control: gelu(E U + b), a nonlinear lift with exactly as many parameters as the quantum one."""

    table_std = 1.0

    def __init__(self, config: ModelShape) -> None:
        super().__init__(config)
        self.up = LiftLinear(config.d_model, config.hidden_size, gain=_gain(config))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the lifted rows (..., D) of `embeddings` (..., d)."""
        return F.gelu(self.up(embeddings))


class NoLift(nn.Identity):
    """Control: no projector. The rows of the table are the states, and the model is a plain tied transformer."""

    table_std = 0.5

    def __init__(self, config: ModelShape) -> None:
        super().__init__()


PROJECTORS: dict[str, type[QuantumProjector | LinearLift | NoLift]] = {
    "quantum": QuantumProjector,
    "phase-only": QuantumProjector,
    "frozen": QuantumProjector,
    "gated": GatedProjector,
    "linear": LinearLift,
    "mlp": MLPLift,
    "none": NoLift,
}
