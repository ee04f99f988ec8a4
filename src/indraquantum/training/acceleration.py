"""Less memory or more speed in the layers: activations computed again in the backward pass, or compiled layers."""

from __future__ import annotations

import torch

from indraquantum.config import TrainSettings
from indraquantum.errors import UserError
from indraquantum.model.modeling import IndraQuantumPhase2

MOST_SHAPES = 256  # rows of micro-batches and evaluations, times layers


def accelerate(model: IndraQuantumPhase2, settings: TrainSettings, device: torch.device) -> None:
    """Apply what `settings` ask for to the layers of `model`, in place.

    Raises:
        UserError: layers are to be compiled and no compiler works here.
    """
    if settings.gradient_checkpointing:
        model.backbone.activation_checkpointing_enable()
    if settings.compile:
        require_compiler(device)
        # What is compiled for a shape must not depend on the shapes before it, or a resumed run would have other bits:
        # so no shape is left open, and none is one too many (then torch would go on without compiling).
        torch.compiler.config.recompile_limit = MOST_SHAPES
        for layer in model.backbone.layers:  # alike, so that one compilation serves all
            layer.compile(dynamic=False)


def require_compiler(device: torch.device) -> None:
    """Compile something tiny, forward and backward.

    Raises:
        UserError: it fails; the reason is in the message.
    """
    weight = torch.ones(3, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sin() * x).sum())(weight).backward()
    except Exception as error:  # whatever a compiler, a driver or a read-only cache may raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError("--compile", True, f"needs a compiler that works here ({reason}); leave it out") from None
