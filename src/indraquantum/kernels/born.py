"""Born's rule in place of interference: logits_v = ln(|scale * <Z_v, psi>|^2 + 1e-6) + bias_v.

It is not linear in psi, so the fused objective can't compute it. The logits are built for a few rows at a time, and
again for the gradient. This is slow and only for study.

Legend: N rows (token positions), D real width (first half real parts, second half imaginary parts), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from indraquantum.kernels.arguments import LinearInputs, ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.reference import dense_objective

BORN_EPSILON = 1e-6
BORN_ROWS = 256  # whose logits exist at a time
_OF_EACH_ROW = ("states_ND", "labels_N", "signal_ids_NK", "signal_probs_NK")


def conjugate_turn(states: Tensor) -> Tensor:
    """Return -i * psi as real pairs (..., D), so that z . conjugate_turn(psi) = Im<z, psi>."""
    real, imaginary = states.chunk(2, dim=-1)
    return torch.cat([imaginary, -real], dim=-1)


def born_logits(states: Tensor, table_VD: Tensor, bias_V: Tensor | None, scale: Tensor | None) -> Tensor:
    """Log-probabilities up to a constant (..., V) of `states` (..., D)."""
    scaled = states if scale is None else states * scale
    real, imaginary = scaled @ table_VD.T, conjugate_turn(scaled) @ table_VD.T
    logits = torch.log(real.square() + imaginary.square() + BORN_EPSILON)
    return logits if bias_V is None else logits + bias_V


def born_objective(inputs: LinearInputs, options: ObjectiveOptions) -> ObjectiveResult:
    """The objective of `born_logits`, differentiable by autograd, in the highest precision of states and table."""
    dtype = torch.promote_types(inputs.states_ND.dtype, inputs.table_VD.dtype)
    inputs = inputs._replace(states_ND=inputs.states_ND.to(dtype), table_VD=inputs.table_VD.to(dtype))

    def part(chunk: LinearInputs) -> ObjectiveResult:
        logits_nV = born_logits(chunk.states_ND, chunk.table_VD, chunk.bias_V, chunk.scale)
        # Sums of 16-bit terms would be rounded as they grow.
        return dense_objective(logits_nV.to(torch.promote_types(dtype, torch.float32)), chunk, options)

    sums: list[Tensor | None] = [None] * len(ObjectiveResult._fields)
    for start in range(0, max(1, len(inputs.labels_N)), BORN_ROWS):
        of_rows = {name: getattr(inputs, name) for name in _OF_EACH_ROW}
        chunk = {name: x if x is None else x[start : start + BORN_ROWS] for name, x in of_rows.items()}
        terms = checkpoint(part, inputs._replace(**chunk), use_reentrant=False)
        sums = [new if old is None else old + new for old, new in zip(sums, terms, strict=True)]
    return ObjectiveResult(*sums)
