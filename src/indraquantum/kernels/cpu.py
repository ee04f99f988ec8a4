"""The objective on CPUs, in plain torch: chunks with a small buffer, and tiles that stay in the cache."""

from __future__ import annotations

import torch

from indraquantum.kernels.arguments import LinearInputs, ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.attach import differentiable_objective
from indraquantum.kernels.chunked import Plan, Products
from indraquantum.kernels.ways import in_force

_BUFFER_BYTES = 32 * 2**20  # larger chunks mean fewer passes over the table's gradient, and more memory
_LEAST_LANE = 256  # the smallest part of the vocabulary for which a thread is worth starting


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
        rows = max(1, min(way.rows, _BUFFER_BYTES // (vocabulary_size * dtype.itemsize)))
        rows = rows // 16 * 16 or rows
    if lanes is None:
        lanes = max(1, min(torch.get_num_threads(), vocabulary_size // _LEAST_LANE))
    return Plan(rows, tile or way.tile, lanes, dtype, Products())


def cpu_objective(inputs: LinearInputs, options: ObjectiveOptions) -> ObjectiveResult:
    """Compute in float64 if an input is float64, else in float32."""
    dtype = torch.promote_types(inputs.states_ND.dtype, inputs.table_VD.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return differentiable_objective(inputs, options, cpu_plan(inputs.table_VD.shape[0], dtype))
