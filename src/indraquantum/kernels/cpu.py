"""The objective on CPUs, in plain torch: chunks with a small buffer, and tiles that stay in the cache."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from indraquantum.kernels.arguments import LinearInputs, ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.attach import differentiable_objective
from indraquantum.kernels.chunked import Plan, Products
from indraquantum.kernels.onednn import has_16_bit_units, rounding
from indraquantum.kernels.ways import in_force

_BUFFER_BYTES = 32 * 2**20  # larger chunks mean fewer passes over the table's gradient, and more memory
ROUNDED_ROWS, ROUNDED_TILE = 512, 2000  # the quickest on a Xeon with AMX
_LEAST_LANE = 256  # the smallest part of the vocabulary for which a thread is worth starting


class RoundedProducts(Products):
    """Operands rounded to bfloat16 and sums in float32, by processors that have units for it.

    A product with kept exponentials is itself rounded to bfloat16 before it is added.
    """

    def setting(self, device: torch.device) -> AbstractContextManager[None]:
        """Let oneDNN round the operands."""
        return rounding()

    def added(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out += left @ right`."""
        if left.dtype == out.dtype:
            out.addmm_(left, right)
        else:
            out.add_(left @ right)

    def added_vector(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out += left @ right` for vectors `out` and `right`."""
        out.add_(left @ right)


def cpu_plan(
    vocabulary_size: int,
    dtype: torch.dtype,
    rows: int | None = None,
    tile: int | None = None,
    lanes: int | None = None,
) -> Plan:
    """Divide the work as the way in force says, with a buffer of at most 32 MiB. The other arguments override it."""
    way = in_force()
    if rows is None:
        rows = _rows_of_chunk(way.rows, vocabulary_size, dtype)
    if lanes is None:
        lanes = max(1, min(torch.get_num_threads(), vocabulary_size // _LEAST_LANE))
    return Plan(rows, tile or way.tile, lanes, dtype, Products())


def rounded_plan(
    vocabulary_size: int, rows: int | None = None, tile: int | None = None, lanes: int | None = None
) -> Plan:
    """Divide the work for products in bfloat16. Their buffer is half as large, so a chunk has more rows."""
    if rows is None:
        rows = _rows_of_chunk(ROUNDED_ROWS, vocabulary_size, torch.bfloat16)
    plan = cpu_plan(vocabulary_size, torch.float32, rows, tile or ROUNDED_TILE, lanes)
    return replace(plan, products=RoundedProducts(), kept=torch.bfloat16)


def _rows_of_chunk(most: int, vocabulary_size: int, dtype: torch.dtype) -> int:
    """Return how many rows of logits in `dtype` the buffer holds, but at most `most`: a multiple of 16 if possible."""
    rows = max(1, min(most, _BUFFER_BYTES // (vocabulary_size * dtype.itemsize)))
    return rows // 16 * 16 or rows


def cpu_objective(inputs: LinearInputs, options: ObjectiveOptions) -> ObjectiveResult:
    """Compute in float64 if an input is float64, in bfloat16 products if the states ask for it, else in float32."""
    vocabulary_size = inputs.table_VD.shape[0]
    if inputs.states_ND.dtype == torch.bfloat16 and has_16_bit_units():
        return differentiable_objective(inputs, options, rounded_plan(vocabulary_size))
    dtype = torch.promote_types(inputs.states_ND.dtype, inputs.table_VD.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return differentiable_objective(inputs, options, cpu_plan(vocabulary_size, dtype))
