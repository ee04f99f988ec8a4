"""What a run is, beside its metrics: `run.json`, so that `indra runs` can list and compare runs without checkpoints."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from indraquantum.errors import UserError
from indraquantum.files import atomic_file, not_written
from indraquantum.metrics import RECORD_NAME, checked_lines, read_record
from indraquantum.training.run import Run


def output_of_record(folder: Path) -> Path | None:
    """The output folder of the run that logs to `folder`; None where none does: no whole record, or a copied one."""
    try:
        settings = (read_record(folder) or {})["settings"]
        output, logs = Path(settings["output"]), Path(settings["logs"])
        here = (logs / output.resolve().name).resolve() == folder.resolve()
    except (UserError, OSError, ValueError, TypeError, KeyError, RuntimeError):  # the last one: links that form a loop
        return None
    return output if here else None


def set_others_metrics_aside(path: Path, run: Run, resumed: bool) -> None:
    """Rename the metrics at `path` if they are of another run, so that `run` neither continues nor replaces them.

    They are its own where run.json says so. Without that, as in a folder that was copied, a resumed run knows them by
    the figures that its checkpoint holds: the best evaluation, or before any the tokens of its step.
    """
    if not path.exists() or not path.stat().st_size:
        return
    output = output_of_record(path.parent)
    if output is not None and output.resolve() == run.settings.output.resolve():
        return
    if resumed and _are_of(path, run):
        return
    aside = next(
        name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.set-aside-{n}")).exists()
    )
    path.rename(aside)
    print(f"warning: {path} is of another run; it is {aside.name} now, and this run begins a new file", file=sys.stderr)


def _are_of(path: Path, run: Run) -> bool:
    """Whether the metrics at `path` have the figures that the checkpoint of `run` holds."""
    best = run.best.cross_entropy
    step = run.step if best is None else run.best.step
    for line in checked_lines(path):
        if line.step == step:
            metrics = line.parse()
            if best is None:
                return metrics.get("tokens") == run.tokens
            held_out = metrics.get("held_out")
            return isinstance(held_out, dict) and held_out.get("all") == best
    return False


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
