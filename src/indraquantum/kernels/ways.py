"""The way in which the CPU computes: whose float32 products, and how the objective is cut into chunks and tiles.

Ways differ in the last bits and in speed. One is in force in the whole process: what `INDRA_PRODUCTS` says, what a
checkpoint or the signals' manifest was begun with, or what was quickest when this machine was measured
(kernels/measured.py). Elsewhere, as in a program that uses the model alone, it is the usual one.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from indraquantum.errors import UserError

VARIABLE = "INDRA_PRODUCTS"


@dataclass(frozen=True)
class Way:
    """A way to compute; as text `onednn:512x1000`."""

    products: str  # onednn, where that is exact, or torch, which asks the BLAS it was built with
    rows: int = 512  # of a chunk, at most; the buffer's size is another limit
    tile: int = 1000  # tokens that one step takes

    def __str__(self) -> str:
        return f"{self.products}:{self.rows}x{self.tile}"


USUAL = Way("onednn")  # also of everything that was written before ways were chosen
_in_force: Way | None = None


def parsed(field: str, text: str) -> Way:
    """The way that `text` spells; rows and tile may be left out.

    Raises:
        UserError: no way is spelled like that; `field` is what to name.
    """
    found = re.fullmatch(r"(onednn|torch)(?::([1-9]\d{0,6})x([1-9]\d{0,6}))?", text)
    if not found:
        raise UserError(field, text, "must be auto, onednn or torch, maybe with rows and tile, as in onednn:512x1000")
    products, rows, tile = found.groups()
    return Way(products, int(rows), int(tile)) if rows else Way(products)


def asked_for() -> Way | None:
    """What the environment asks for; None where it leaves the choice.

    Raises:
        UserError: it asks for what is no way.
    """
    text = os.environ.get(VARIABLE) or "auto"
    return None if text == "auto" else parsed(VARIABLE, text)


def in_force() -> Way:
    """The way in which this process computes."""
    return _in_force or asked_for() or USUAL


def put_in_force(way: Way) -> None:
    """Compute in this way from here on."""
    global _in_force
    _in_force = way


@contextlib.contextmanager
def using(way: Way) -> Iterator[None]:
    """Compute in this way inside."""
    global _in_force
    before, _in_force = _in_force, way
    try:
        yield
    finally:
        _in_force = before


def continued(began: str | None, field: str) -> Way:
    """The way of what began as `began` (None before ways were kept), unless the environment asks for another.

    Raises:
        UserError: `began` is no way; `field` is what to name.
    """
    way = USUAL if began is None else parsed(field, began)
    asked = asked_for() or way
    if asked != way:
        print(f"Computing by {asked} from here on, not by {way}: the last bits may differ.", file=sys.stderr)
    return asked
