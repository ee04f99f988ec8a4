"""The way in which the CPU computes: which float32 products it uses, and the chunks and tiles of the objective.

Ways differ in speed and in the last bits. One of them is in force in the whole process: the one in `INDRA_PRODUCTS`,
the one that a checkpoint was begun with, or the quickest one on this machine (kernels/measured.py). A program that only
uses the model gets the usual one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from indraquantum.errors import UserError
from indraquantum.progress import warn

VARIABLE = "INDRA_PRODUCTS"


@dataclass(frozen=True)
class Way:
    """A way to compute, which is written as `onednn:512x1000`."""

    products: str  # onednn, if that is exact, or torch, which uses the BLAS it was built with
    rows: int = 512  # of a chunk, at most; the buffer's size is another limit
    tile: int = 1000  # tokens of one step

    def __str__(self) -> str:
        return f"{self.products}:{self.rows}x{self.tile}"


USUAL = Way("onednn")  # also the way of everything written before ways were chosen
_in_force: Way | None = None


def parsed(field: str, text: str) -> Way:
    """Return the way that `text` names; rows and tile may be left out.

    Raises:
        UserError: `text` does not name a way; `field` is the option to name.
    """
    found = re.fullmatch(r"(onednn|torch)(?::([1-9]\d{0,6})x([1-9]\d{0,6}))?", text)
    if not found:
        raise UserError(
            field, text, "must be auto, onednn or torch, with or without rows and tile, as in onednn:512x1000"
        )
    products, rows, tile = found.groups()
    return Way(products, int(rows), int(tile)) if rows else Way(products)


def asked_for() -> Way | None:
    """Return the way that the environment asks for; None if it asks for none.

    Raises:
        UserError: the environment names no valid way.
    """
    text = os.environ.get(VARIABLE) or "auto"
    return None if text == "auto" else parsed(VARIABLE, text)


def in_force() -> Way:
    """Return the way in which this process computes."""
    return _in_force or asked_for() or USUAL


def put_in_force(way: Way) -> None:
    """Compute in this way from now on."""
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
    """Return the way of a run that began with `began` (None before ways were kept), or the one in the environment.

    Raises:
        UserError: `began` is not a valid way; `field` is the option to name.
    """
    way = USUAL if began is None else parsed(field, began)
    asked = asked_for() or way
    if asked != way:
        warn(f"From now on, products are computed with {asked} instead of {way}; the last bits may differ.")
    return asked
