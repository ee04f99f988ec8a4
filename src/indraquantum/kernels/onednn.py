"""oneDNN's float32 matrix products in place of MKL's, where they are as exact and the way in force says so.

On AMD's AVX-512 cores they are faster, on Intel's about as fast or slower: kernels/measured.py finds out.

torch gives float32 products to oneDNN only where it is allowed to round their operands to bfloat16. Processors with
AMX then do round; the other ones with AVX-512 have no such units for float32 operands and multiply exactly. A probe
decides once a process, so that nothing is ever rounded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from indraquantum.kernels.ways import in_force

_PROBES = ((64, 64, 64), (1000, 256, 256), (256, 1000, 256))  # rows, inner width, columns
_TOLERANCE = 2e-6  # relative; float32 sums stay below 1e-6, bfloat16 operands are at 3e-3


@contextlib.contextmanager
def onednn_products() -> Iterator[None]:
    """Let oneDNN multiply on the CPU inside, if the way in force says so and it is exact; a decorator too."""
    with _allowed() if in_force().products == "onednn" and is_exact() else contextlib.nullcontext():
        yield


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN, when allowed to round float32 operands on this processor, does not."""
    with _allowed():
        return agrees_with_float64(torch.mm)


def agrees_with_float64(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether `product` of float32 matrices, also transposed ones, is as exact as float32 sums are."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in _PROBES:
        left, right = (torch.randn(size, generator=generator) for size in ((rows, inner), (inner, columns)))
        for pair in ((left, right), (left, right.T.contiguous().T), (left.T.contiguous().T, right)):
            exact = left.double() @ right.double()
            if (product(*pair) - exact).norm() > _TOLERANCE * exact.norm():
                return False
    return True


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
