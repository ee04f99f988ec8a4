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
        self._kept: tuple[list[Tensor], Tensor] | None = None  # replaced as a whole: other threads may read it

    def __reduce__(self) -> tuple[type[KeptTable], tuple[()]]:
        return KeptTable, ()

    def get(self, sources: Sequence[Tensor], lift: Callable[[], Tensor]) -> Tensor:
        """Return the table (V, D): the kept one where no source has changed in a bit, else a new one from `lift`."""
        kept = self._kept
        if kept is None or not _equal(kept[0], sources):
            kept = self._kept = [source.detach().clone() for source in sources], lift()
        return kept[1]

    def drop(self) -> None:
        """Free the memory."""
        self._kept = None


def _equal(kept: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(kept) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(kept, now, strict=True)
    )
