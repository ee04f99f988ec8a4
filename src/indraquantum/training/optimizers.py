"""AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes each matrix's momentum orthogonal before it
is applied. Its updates are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2),
so one learning rate fits both. At 3 or 4 times that rate it is better than AdamW alone (docs/LOG.md, 2026-11-25).

torch has a Muon too, but it computes only in bfloat16. There, this one gives the same bits. On processors without
bfloat16 units, bfloat16 takes 26 times as long as float32 (docs/LOG.md, 2026-11-27), so this one also has float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from indraquantum.config import TrainSettings
from indraquantum.device import best_16_bits
from indraquantum.errors import UserError
from indraquantum.kernels.onednn import has_16_bit_units
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import ALONE, Processes, from_process, shard_like, whole

BETAS = (0.9, 0.95)
MUON_GROUP = "layers"
MOMENTUM = 0.95
# The polynomial a x + b x^3 + c x^5, applied five times, maps singular values above 0.0015 to between 0.68 and 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimiser with one list of groups and one state, so that one checkpoint entry holds both.

    Args:
        groups: parameter groups with names, as for AdamW. The group MUON_GROUP holds matrices, which Muon updates.
        processes: the processes of the run, which share the work on the matrices.
    """

    def __init__(self, groups: list[dict[str, Any]], processes: Processes = ALONE) -> None:
        self._processes = processes
        self._adamw = torch.optim.AdamW([g for g in groups if g["name"] != MUON_GROUP], betas=BETAS, fused=True)
        super().__init__([*self._adamw.param_groups, *(g for g in groups if g["name"] == MUON_GROUP)], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        # Loading a state replaces `state` and `param_groups`, so AdamW gets the present ones.
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if g["name"] != MUON_GROUP]
        self._adamw.step()
        for group in self.param_groups:
            if group["name"] == MUON_GROUP:
                # Sorted by size, so that matrices that are updated at the same time take about equally long.
                matrices = sorted((p for p in group["params"] if p.grad is not None), key=torch.numel)
                for first in range(0, len(matrices), self._processes.world):
                    self._turn(matrices[first : first + self._processes.world], group["lr"], group["weight_decay"])

    def _turn(self, matrices: list[Tensor], learning_rate: float, weight_decay: float) -> None:
        """Do Muon's update of at most one matrix per process. Each process makes one update orthogonal, for all."""
        updates = [whole(self._update(matrix)).contiguous() for matrix in matrices]
        if self._processes.rank < len(updates):
            own = updates[self._processes.rank]
            own.copy_(orthogonal(own, turning_format(own.device.type)))
        for rank, (matrix, update) in enumerate(zip(matrices, updates, strict=True)):
            turned = from_process(self._processes, rank, update)
            matrix.mul_(1 - learning_rate * weight_decay)
            matrix.add_(shard_like(turned, matrix), alpha=-learning_rate * 0.2 * math.sqrt(max(turned.shape)))

    def _update(self, matrix: Tensor) -> Tensor:
        """Return the update that Nesterov's momentum gives."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"]
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T for `matrix` = U S V^T, by Newton and Schulz's iteration. It computes in `dtype`."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    turned = matrix.to(dtype, copy=True)
    turned = turned.T if is_tall else turned
    turned.div_(turned.norm().clamp(min=1e-7))
    for _ in range(ITERATIONS):
        gram = turned @ turned.T
        turned = torch.addmm(turned, torch.addmm(gram, gram, gram, beta=b, alpha=c), turned, beta=a)
    return turned.T if is_tall else turned


def turning_format(device_type: str) -> torch.dtype:
    """Return bfloat16, as in Muon's paper, or float32 on devices that lack, or only emulate, products in bfloat16."""
    if device_type == "cuda":
        has_units = best_16_bits() is torch.bfloat16
    else:
        has_units = device_type == "cpu" and has_16_bit_units()
    return torch.bfloat16 if has_units else torch.float32


def check_rates(model: IndraQuantumPhase2, settings: TrainSettings) -> None:
    """Check that the model has the parts that `settings` give learning rates for. `model` may be on the meta device.

    Raises:
        UserError: a part is missing.
    """
    given = settings.model_fields_set
    if settings.optimizer != "muon" and "muon_rate" in given and settings.muon_rate != 1:
        raise UserError("--muon-rate", settings.muon_rate, "must be 1 without --optimizer muon")
    learns = any(group["name"].startswith("projector") for group in _groups(model, settings))
    if not learns and "projector_rate" in given and settings.projector_rate != 1:
        allowed = f"must be 1 with --projector {settings.projector}, which has no trainable weights"
        raise UserError("--projector-rate", settings.projector_rate, allowed)


def _groups(model: IndraQuantumPhase2, settings: TrainSettings) -> list[dict[str, Any]]:
    return model.parameter_groups(
        settings.learning_rate,
        settings.table_rate,
        settings.weight_decay,
        projector_rate=settings.projector_rate,
        table_weight_decay=settings.table_weight_decay,
    )


def new_optimizer(
    model: IndraQuantumPhase2, settings: TrainSettings, processes: Processes = ALONE
) -> torch.optim.Optimizer:
    """Return a new optimiser of `model`, whose weights `processes` may share in shards.

    Raises:
        UserError: a learning rate is given for a part that the model lacks.
    """
    check_rates(model, settings)
    groups = _groups(model, settings)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    for group in groups:
        if group["name"] == MUON_GROUP:
            group["rate"] = settings.muon_rate
            group["lr"] = settings.learning_rate * settings.muon_rate
    return MuonAdamW(groups, processes)
