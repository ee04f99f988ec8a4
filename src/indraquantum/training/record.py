"""What a run is, beside its metrics: `run.json`, so that `indra runs` can list and compare runs without checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from indraquantum.files import atomic_file, not_written
from indraquantum.metrics import RECORD_NAME
from indraquantum.training.run import Run


def output_of_record(folder: Path) -> Path | None:
    """The output folder of the run that logs to `folder`; None where none does: no whole record, or a copied one."""
    try:
        settings = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))["settings"]
        output, logs = Path(settings["output"]), Path(settings["logs"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return output if (logs / output.resolve().name).resolve() == folder.resolve() else None


def write_record(folder: Path, run: Run) -> None:
    """Write `folder`/run.json: settings, the data's and signals' hashes, steps in all, and whether `run` has finished.

    Raises:
        UserError: it can't be written.
    """
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed: the folder is locked
        leftover.unlink()
    # As typed they would mean others to a command in another folder.
    folders = {name: str(getattr(run.settings, name).resolve()) for name in ("output", "logs")}
    record = {
        "settings": run.settings.model_dump(mode="json") | folders | {"tail": run.identity["tail"]},
        "data": run.identity["data"],
        "signals": run.identity["signals"],
        "total_steps": run.total_steps,
        "planned_steps": run.plan.planned_steps,
        "finished": run.finished,
    }
    content = json.dumps(record, indent=2) + "\n"
    try:
        with atomic_file(folder / RECORD_NAME) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as error:
        raise not_written("--logs", folder / RECORD_NAME, len(content), error) from None
