"""Uses oneDNN's float32 matrix products instead of MKL's if they are as exact and the way in force says so.

On AMD's AVX-512 cores they are faster; on Intel's they are about as fast or slower. kernels/measured.py finds out.

torch gives float32 products to oneDNN only if oneDNN may round their operands to bfloat16. Processors with AMX then do
round. Other processors with AVX-512 multiply float32 operands exactly. A probe decides this once in each process, so
that nothing is rounded unless `--precision bfloat16` asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from indraquantum.errors import UserError
from indraquantum.kernels.ways import in_force
from indraquantum.progress import warn

VARIABLE = "INDRA_BFLOAT16"
_PROBES = ((64, 64, 64), (1000, 256, 256), (256, 1000, 256))  # rows, inner width, columns
_TOLERANCE = 2e-6  # relative; float32 sums stay below 1e-6, bfloat16 operands are at 3e-3


@contextlib.contextmanager
def onednn_products(device: torch.device) -> Iterator[None]:
    """Inside, let oneDNN multiply on the CPU if the way in force says so and it is exact.

    If `device` is not a CPU, nothing changes: the setting would do nothing there, but inside it torch's own
    `get_float32_matmul_precision` raises an error.
    """
    uses = device.type == "cpu" and in_force().products == "onednn" and is_exact()
    with rounding() if uses else contextlib.nullcontext():
        yield


@functools.cache
def is_exact() -> bool:
    """Return whether oneDNN does not round float32 operands on this processor although it may."""
    with rounding():
        return agrees_with_float64(torch.mm)


def agrees_with_float64(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return whether `product` of float32 matrices, also transposed ones, is as exact as float32 sums are."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in _PROBES:
        left, right = (torch.randn(size, generator=generator) for size in ((rows, inner), (inner, columns)))
        for pair in ((left, right), (left, right.T.contiguous().T), (left.T.contiguous().T, right)):
            exact = left.double() @ right.double()
            if (product(*pair) - exact).norm() > _TOLERANCE * exact.norm():
                return False
    return True


def has_16_bit_units() -> bool:
    """Return whether the CPU is to multiply in bfloat16: what `INDRA_BFLOAT16` says (0 or 1), or whether it has units.

    Raises:
        UserError: `INDRA_BFLOAT16` is neither.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise UserError(VARIABLE, asked, "must be 0 or 1")
    return asked == "1" if asked else _finds_16_bit_units()


def note_slow_16_bits(device: torch.device, precision: str, work: str = "run") -> None:
    """Say so in one line if `precision` is far slower than float32 on `device`, a CPU without units for it.

    Such a CPU takes 30 to 50 times as long for them (docs/LOG.md, 2026-11-30). Of a run's processes, the first one
    says it.

    Args:
        device: where to compute.
        precision: a value of `--precision`, without auto.
        work: what computes, a run or a capture.
    """
    if precision == "float32" or device.type != "cpu" or has_16_bit_units() or os.environ.get("RANK", "0") != "0":
        return
    warn(
        f"note: this processor has no bfloat16 units, so products in {precision} are many times slower here than in "
        f"float32; a new {work} with --precision float32 is quicker"
    )


@functools.cache
def _finds_16_bit_units() -> bool:
    """Return whether the processor has units for products in bfloat16.

    With AMX, oneDNN rounds float32 operands. On AMD's AVX-512 cores it does not, but products of matrices that are in
    bfloat16 take half the time (docs/LOG.md, 2026-11-29). torch tells of these units since 2.11.
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return not is_exact() or bool(has.get("amx_bf16") or has.get("avx512_bf16"))


@contextlib.contextmanager
def rounding() -> Iterator[None]:
    """Inside, oneDNN multiplies on the CPU and may round float32 operands to bfloat16; it sums in float32."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
