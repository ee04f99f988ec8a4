"""Keeps the lifted table between decoding steps, and notices every change of the tensors it was lifted from.

Lifting V rows for each written token would take most of the time of a decoding loop. Version counters do not show every
change of a weight: edits through `.data`, as in PEFT's merge, do not change them. So the tensors are compared with
copies, which is exact, and ten times cheaper than the lift.

Legend: V vocabulary, D real width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class KeptTable:
    """One lifted table, and copies of the tensors that it was lifted from. A copy or pickle of this object is empty."""

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], Tensor] | None = None  # replaced as a whole, because other threads may read it

    def __reduce__(self) -> tuple[type[KeptTable], tuple[()]]:
        return KeptTable, ()

    def get(self, sources: Sequence[Tensor], lift: Callable[[], Tensor]) -> Tensor:
        """Return the table (V, D): the kept one if no bit of its sources has changed, else a new one from `lift`."""
        kept = self._kept
        if kept is None or not _equal(kept[0], sources):
            kept = self._kept = [source.detach().clone() for source in sources], lift()
        return kept[1]

    def drop(self) -> None:
        """Drop the table and free its memory."""
        self._kept = None


def _equal(kept: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(kept) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(kept, now, strict=True)
    )
