"""The number format of the layers: float32, or 16 bits by autocast, with a loss scale where the format needs one.

Weights, lifted table, objective and optimiser stay float32 in every format; so do held-out figures.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from indraquantum.config import TrainSettings
from indraquantum.device import best_16_bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """A number format on a device, and its loss scale, which does nothing but for float16."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self.dtype = dtype
        self._device_type = "cpu" if device is None else device.type
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, the matrix products of the layers are computed in the format."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, self.dtype)

    @property
    def name(self) -> str:
        """As `--precision` spells it."""
        return next(name for name, dtype in DTYPES.items() if dtype is self.dtype)

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite may be the loss scale's fault: it is halved then, down to 1."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1


def choose_precision(settings: TrainSettings, device: torch.device) -> Precision:
    """The format that `settings` ask for; auto takes 16 bits on CUDA, bfloat16 where the card has it, else float32."""
    if settings.precision != "auto":
        return Precision(DTYPES[settings.precision], device)
    if device.type != "cuda":
        return Precision(torch.float32, device)
    return Precision(best_16_bits(), device)
