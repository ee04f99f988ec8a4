"""Tokens that occur nowhere in a run's text: they share one embedding, so that the loss takes less arithmetic.

Real text uses a part of a vocabulary only. The logits of the other tokens are never wanted; they only sink. If all of
them have the same embedding and bias, they also have the same logit z, and their part of the softmax's sum is
`count * exp(z) = exp(z + log(count))`: one row of the objective instead of `count` rows. Nothing is approximated: the
loss and its gradient are those of the whole vocabulary, and the model's table is complete after each step.

Legend: V vocabulary, R used tokens and one for all unseen ones, U unseen tokens, D real width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from indraquantum.processes import shard_like
from indraquantum.training.plan import Plan

FEWEST = 0.02  # of the vocabulary; sharing fewer would save nothing


@dataclass(frozen=True, eq=False)
class UnseenTokens:
    """The tokens that no row of a run holds. All of them have the embedding and the bias of the first one."""

    ids_R: Tensor  # ids of the tokens that the objective compares: the used ones, then the first unseen one
    place_V: Tensor  # where each token stands in `ids_R`
    ids_U: Tensor  # ids of the unseen tokens

    @classmethod
    def of(cls, seen_V: np.ndarray) -> UnseenTokens:
        """Return the tokens for which `seen_V` (V,) bool is False; at least one must be."""
        unseen_U = np.flatnonzero(~seen_V)
        ids_R = np.concatenate([np.flatnonzero(seen_V), unseen_U[:1]])
        place_V = np.full(len(seen_V), len(ids_R) - 1)
        place_V[ids_R] = np.arange(len(ids_R))
        return cls(*map(torch.from_numpy, (ids_R, place_V, unseen_U)))

    def to(self, device: torch.device) -> UnseenTokens:
        """Return this with its tensors on `device`."""
        return UnseenTokens(self.ids_R.to(device), self.place_V.to(device), self.ids_U.to(device))

    def bias_R(self, bias_V: Tensor | None, like: Tensor) -> Tensor:
        """Return the bias of each row of the objective. The last one counts for all unseen tokens.

        Args:
            bias_V: the head's bias (V,); None if it has none.
            like: a tensor with the device and the number format of the result.
        """
        shares_R = like.new_zeros(len(self.ids_R))
        shares_R[-1] = math.log(len(self.ids_U))
        return shares_R if bias_V is None else bias_V[self.ids_R] + shares_R

    @torch.no_grad()
    def share(self, parameter: Tensor) -> None:
        """Give all unseen tokens the first one's row of `parameter` (V, ...), in place; it may be sharded (FSDP2)."""
        if not hasattr(parameter, "full_tensor"):
            parameter[self.ids_U] = parameter[self.ids_U[0]].clone()
            return
        is_first_V, is_unseen_V = torch.zeros((2, len(self.place_V)), dtype=torch.bool, device=self.ids_U.device)
        is_first_V[self.ids_U[0]] = is_unseen_V[self.ids_U] = True
        own = parameter.to_local()
        first, unseen = (shard_like(x_V, parameter).to_local() for x_V in (is_first_V, is_unseen_V))
        row = own[first].sum(dim=0)  # zero in the processes that do not hold it
        torch.distributed.all_reduce(row, group=parameter.device_mesh.get_group())
        own[unseen] = row


def unseen_tokens(plan: Plan) -> UnseenTokens | None:
    """Return the tokens that occur in no training row of `plan`.

    It is None if there are too few, if a teacher may want any token, if a checkpoint has learned them, or if the head's
    logits are not linear in the states.
    """
    strategy, settings = plan.strategy, plan.stages[0].settings
    if getattr(settings, "unseen_tokens", "separate") == "separate" or settings.head == "born":
        return None
    if strategy.asks_the_teacher or strategy.start_from is not None:
        return None
    size = plan.dataset.tokenizer.vocabulary_size
    seen_V = np.zeros(size, dtype=bool)
    for stage in plan.stages:
        seen_V[np.unique(stage.dataset.train.tokens)] = True
    return None if np.count_nonzero(~seen_V) < max(2, FEWEST * size) else UnseenTokens.of(seen_V)
