"""Keeps the lifted table from one decoding step to the next, and notices every change of what it was lifted from.

Lifting V rows for each written token would take most of the time of a decoding loop. Version counters do not tell
whether a weight has changed: edits through `.data`, as PEFT's merge makes them, leave them as they were. So the sources
are compared with copies, which is exact, and an order of magnitude cheaper than the lift.

Legend: V vocabulary, D real width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class KeptTable:
    """One lifted table and copies of the tensors that it was lifted from; a copied or pickled one is empty."""

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._table_VD: Tensor | None = None

    def __reduce__(self) -> tuple[type[KeptTable], tuple[()]]:
        return KeptTable, ()

    def get(self, sources: Sequence[Tensor], lift: Callable[[], Tensor]) -> Tensor:
        """Return the table (V, D): the kept one where no source has changed in a bit, else a new one from `lift`."""
        if self._table_VD is None or not _equal(self._sources, sources):
            self._sources = [source.detach().clone() for source in sources]
            self._table_VD = lift()
        return self._table_VD

    def drop(self) -> None:
        """Free the memory."""
        self._sources, self._table_VD = [], None


def _equal(kept: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(kept) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(kept, now, strict=True)
    )
