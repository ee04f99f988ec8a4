"""An exponential moving average of the weights: often better than the last ones, and what is evaluated where kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's trainable weights over its steps; with a decay of 0 it is empty and does nothing.

    Args:
        model: whose weights to average, as it stands at its first step.
        decay: part of the average that stays at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and decay}
        self.weights = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps; the first steps count for more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(model.get_parameter(name), 1 - decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from the average of a checkpoint of the same run."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the average for weights; must not be interrupted on the way in or out."""
        own = {name: model.get_parameter(name).detach().clone() for name in self.weights}
        _fill(model, self.weights)
        try:
            yield
        finally:
            _fill(model, own)


@torch.no_grad()
def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
