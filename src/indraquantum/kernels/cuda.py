"""The objective on accelerators: the same chunks, larger, with bfloat16 operands and float32 accumulation.

Bfloat16 states are multiplied as they are. Sums, softmax and collected gradients are float32. On a device without such
products (and on CPUs, in the tests) the rounded operands are multiplied in float32, which is the same arithmetic.
Float16 is computed in float32, because the undivided exponentials would exceed its range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from indraquantum.kernels.arguments import LinearInputs, ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.attach import differentiable_objective
from indraquantum.kernels.chunked import Plan, Products

_BUFFER_BYTES = 512 * 2**20  # enough rows to fill the device's multiprocessors
_MAX_ROWS = 8192


class Bfloat16Products(Products):
    """Operands rounded to bfloat16, products summed in float32."""

    def operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The table in bfloat16; the plan's dtype is for sums only."""
        return tensor.bfloat16()

    def left_factor(self, tensor: Tensor) -> Tensor:
        """Round a chunk's gradient to bfloat16 once, for both products that use it."""
        return tensor.bfloat16()

    def into(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out = left @ right`."""
        left, right = left.bfloat16(), right.bfloat16()
        if left.is_cuda:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left.float(), right.float(), out=out)

    def added(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out += left @ right`."""
        out.add_(self._product(left, right))

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.bfloat16(), right.bfloat16()
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()


def cuda_plan_rows(vocabulary_size: int) -> int:
    """Return the rows of a chunk: as many as the buffer holds in float32."""
    return max(1, min(_MAX_ROWS, _BUFFER_BYTES // (4 * vocabulary_size)))


def cuda_plan(inputs: LinearInputs, rows: int | None = None) -> Plan:
    """Plan one tile over the whole vocabulary, and as many rows as the buffer holds; `rows` overrides it."""
    vocabulary_size = inputs.table_VD.shape[0]
    if rows is None:
        rows = cuda_plan_rows(vocabulary_size)
    if inputs.states_ND.dtype == torch.bfloat16:
        return Plan(rows, vocabulary_size, 1, torch.float32, Bfloat16Products())
    dtype = torch.promote_types(inputs.states_ND.dtype, inputs.table_VD.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return Plan(rows, vocabulary_size, 1, dtype, Products())


def cuda_objective(inputs: LinearInputs, options: ObjectiveOptions) -> ObjectiveResult:
    """Compute with bfloat16 products if the states are bfloat16, else in float32 or float64."""
    return differentiable_objective(inputs, options, cuda_plan(inputs))
