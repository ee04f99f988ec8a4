"""Where to compute: the device and the number of threads."""

from __future__ import annotations

import torch

from indraquantum.config import DeviceSettings
from indraquantum.errors import UserError


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no wider format."""
    return torch.float32 if device.type == "mps" else torch.float64


def best_16_bits() -> torch.dtype:
    """Return the 16-bit format of the CUDA device: bfloat16 if the card has it; emulated bfloat16 would be slow."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def choose_device(settings: DeviceSettings) -> torch.device:
    """Set torch's threads and return the device that `settings` ask for. auto never takes MPS, which nobody has tried.

    Raises:
        UserError: the machine does not have this device.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not is_there[settings.device]():
        there = ", ".join(name for name, ask in is_there.items() if ask())
        raise UserError("--device", settings.device, f"must be a device of this machine: auto, {there}")
    return torch.device(settings.device)
