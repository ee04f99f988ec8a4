"""AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes each matrix's momentum orthogonal before it
is applied. Its updates are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2),
so that one learning rate serves both. At 3 or 4 times that rate it beats AdamW alone (docs/LOG.md, 2026-11-25).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from indraquantum.config import TrainSettings
from indraquantum.errors import UserError
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.processes import shard_like, whole

BETAS = (0.9, 0.95)
MUON_GROUP = "layers"


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW behind one list of groups and one state, so that one checkpoint entry holds both.

    Args:
        groups: AdamW's parameter groups with names; the one named MUON_GROUP goes to Muon.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._muon = torch.optim.Muon([g for g in groups if g["name"] == MUON_GROUP], adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW([g for g in groups if g["name"] != MUON_GROUP], betas=BETAS, fused=True)
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for part, is_muon in ((self._adamw, False), (self._muon, True)):
            # Loading a state replaces both: the parts work on what this optimiser holds.
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if (g["name"] == MUON_GROUP) is is_muon]
            if is_muon and any(hasattr(p, "full_tensor") for p in part.param_groups[0]["params"]):
                self._step_shards(part.param_groups[0])
            else:
                part.step()

    def _step_shards(self, group: dict[str, Any]) -> None:
        """Muon where each process has shards: a turn needs the whole matrix, so one after another is gathered.

        Every process turns every matrix, as with DDP, and keeps its own part; memory for one matrix is needed.
        """
        for shard in group["params"]:
            if shard.grad is None:
                continue
            matrix = torch.nn.Parameter(whole(shard))
            matrix.grad = whole(shard.grad)
            state = {name: whole(value) for name, value in self.state[shard].items()}
            self._muon.state = defaultdict(dict, {matrix: state})
            self._muon.param_groups = [{**group, "params": [matrix]}]
            self._muon.step()
            shard.copy_(shard_like(matrix.detach(), shard))
            self.state[shard] = {name: shard_like(value, shard) for name, value in self._muon.state[matrix].items()}


def new_optimizer(model: IndraQuantumPhase2, settings: TrainSettings) -> torch.optim.Optimizer:
    """A fresh optimiser of `model`, whose weights may lie in shards.

    Raises:
        UserError: a rate is given for what is not there.
    """
    given = settings.model_fields_set
    if settings.optimizer != "muon" and "muon_rate" in given and settings.muon_rate != 1:
        raise UserError("--muon-rate", settings.muon_rate, "must be 1 without --optimizer muon")
    groups = model.parameter_groups(
        settings.learning_rate,
        settings.table_rate,
        settings.weight_decay,
        projector_rate=settings.projector_rate,
        table_weight_decay=settings.table_weight_decay,
    )
    learns = any(group["name"].startswith("projector") for group in groups)
    if not learns and "projector_rate" in given and settings.projector_rate != 1:
        allowed = f"must be 1 with --projector {settings.projector}, which has nothing to learn"
        raise UserError("--projector-rate", settings.projector_rate, allowed)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    for group in groups:
        if group["name"] == MUON_GROUP:
            group["rate"] = settings.muon_rate
            group["lr"] = settings.learning_rate * settings.muon_rate
    return MuonAdamW(groups)
