"""What a browser gets: pages, styles and scripts. The page of `indra monitor` and exported pages share them.

They load nothing from other servers. The folder vendor holds uPlot 1.6.32 (https://github.com/leeoniya/uPlot) with its
licence, unchanged.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def asset(name: str) -> bytes:
    """Return the content of the file `name` of this folder, such as `state.js` or `vendor/uPlot.min.css`."""
    return (FOLDER / name).read_bytes()
