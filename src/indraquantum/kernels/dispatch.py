"""The entry to the fused linear objective: checks the arguments and picks the implementation.

Legend: N rows (token positions), D real width, V vocabulary, K kept teacher tokens of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from indraquantum.kernels.arguments import ObjectiveOptions, ObjectiveResult, check_inputs, require
from indraquantum.kernels.born import born_objective
from indraquantum.kernels.cpu import cpu_objective
from indraquantum.kernels.cuda import cuda_objective
from indraquantum.kernels.reference import reference_objective

Implementation = Literal["auto", "reference", "cpu", "cuda"]
_IMPLEMENTATIONS = {"reference": reference_objective, "cpu": cpu_objective, "cuda": cuda_objective}


def fused_linear_objective(
    states_ND: Tensor,
    table_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: Tensor | float | None = None,
    signal_ids_NK: Tensor | None = None,
    signal_probs_NK: Tensor | None = None,
    token_count: float | None = None,
    options: ObjectiveOptions | None = None,
    implementation: Implementation = "auto",
) -> ObjectiveResult:
    """Cross-entropy and distillation of `scale * states @ table.T + bias`, or of Born's rule.

    Args:
        states_ND: the head's input, one row a position.
        table_VD: the lifted vocabulary.
        labels_N: the next token of each row, or -100 for a row that counts in no term.
        bias_V: added to the logits.
        scale: one number that multiplies the inner products.
        signal_ids_NK: the teacher's tokens, -1 if unused; a row without any counts in cross-entropy only.
        signal_probs_NK: their probabilities (counts / draws, or top-k); at most 1 a row.
        token_count: divides every sum; None takes the labelled rows of this call.
        options: weight, temperature, tail and head.
        implementation: "auto" picks by device. Give "reference" to compare a result with the plain formulas, which
            build the whole N x V logits.

    Returns:
        The total, differentiable in states, table, bias and scale, and its detached parts.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and what is allowed.
    """
    known = ("auto", *_IMPLEMENTATIONS)
    require(implementation in known, "implementation", implementation, f"one of {', '.join(known)}")
    inputs = check_inputs(
        states_ND, table_VD, labels_N, bias_V=bias_V, scale=scale, signal_ids_NK=signal_ids_NK,
        signal_probs_NK=signal_probs_NK, token_count=token_count,
    )  # fmt: skip
    options = options or ObjectiveOptions()
    # Autocast would round the products of some implementations. The inputs alone decide on precision.
    with torch.autocast(states_ND.device.type, enabled=False):
        if options.head == "born":
            require(implementation == "auto", "implementation", implementation, "auto for the head born")
            return born_objective(inputs, options)
        if implementation == "auto":
            implementation = "cpu" if states_ND.device.type == "cpu" else "cuda"
        return _IMPLEMENTATIONS[implementation](inputs, options)
