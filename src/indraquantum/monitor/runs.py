"""Finding runs: every folder below a root that holds a metrics.jsonl is one."""

from __future__ import annotations

import os
from pathlib import Path

from indraquantum.errors import UserError


def find_run(*roots: str | Path) -> Path:
    """The metrics file to look at: $INDRA_METRICS where it is set, else the one written last below `roots`.

    Raises:
        UserError: there is none.
    """
    chosen = os.environ.get("INDRA_METRICS")
    if chosen:
        if not Path(chosen).is_file():
            raise UserError("INDRA_METRICS", chosen, "must be a run's metrics.jsonl")
        return Path(chosen)
    found = [path for root in roots for path in Path(root).rglob("metrics.jsonl")]
    if not found:
        searched = ", ".join(map(str, roots))
        raise UserError("logs", searched, "holds no metrics.jsonl yet: train first, or set INDRA_METRICS")
    return max(found, key=lambda path: path.stat().st_mtime)
