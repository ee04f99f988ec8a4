"""The folders of a run, which it locks against other runs, and its `run.json`.

Writing to a removed file gives no error. So a run checks at each step that its folders are still the same. If one is
gone, the run saves what it can and stops.

`run.json` describes a run, so that `indra runs` can list and compare runs without reading checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from indraquantum.config import ModelSettings, TeacherSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.files import folder_lock, is_locked, make_folder, names_aside, not_written, write_text
from indraquantum.metrics import METRICS_NAME, RECORD_NAME, MetricsLog, checked_lines, read_record
from indraquantum.progress import warn
from indraquantum.training.checkpoint import remove_leftovers
from indraquantum.training.run import LENGTHS, Run
from indraquantum.training.samples import NAME as SAMPLES_NAME


class FolderRemoved(UserError):
    """A folder was removed while the run wrote to it."""


class HeldFolders:
    """The output and the log folder of a run. They are locked against other runs as long as `stack` is open.

    Args:
        output: the folder for checkpoints.
        logs: the folder for metrics.
        stack: releases the folders when it is closed.

    Raises:
        UserError: they can't be written, another run uses them, or the logs belong to another output folder.
    """

    def __init__(self, output: Path, logs: Path, stack: contextlib.ExitStack) -> None:
        if (other := folder_of_record(logs)) and other.resolve() != output.resolve() and other.exists():
            raise UserError(
                "--logs", logs, f"holds the metrics of {other}; give another folder, or an --output with another name"
            )
        make_folder("--output", output)
        make_folder("--logs", logs)
        stack.enter_context(folder_lock("--output", output))
        if logs.resolve() != output.resolve():
            stack.enter_context(folder_lock("--logs", logs))
        remove_leftovers(output)
        self._output, self._as_held = output, output.stat()

    def check(self, log: MetricsLog) -> None:
        """Check that the output folder, and the file that `log` writes to, are still there.

        Raises:
            FolderRemoved: one of them is gone.
        """
        if not self._is_there():
            raise FolderRemoved("--output", self._output, "was removed or replaced while the run wrote to it")
        if not log.is_there():
            raise FolderRemoved("--logs", log.path, "was removed or replaced while the run wrote to it")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self._output.stat(), self._as_held)
        except OSError:
            return False

    def make_again(self, log: MetricsLog) -> list[str]:
        """Restore what was removed, but never overwrite what is there now.

        Returns:
            What happened to the metrics, if they were removed.

        Raises:
            UserError: the output folder belongs to another run now.
        """
        said = []
        if not log.is_there():
            said.append(f"the metrics are in {log.put_back()}")
        if not self._is_there():
            taken = self._output.exists() and (is_locked(self._output) or any(self._output.glob("checkpoint_v4_*")))
            if taken:
                allowed = "was replaced by another run's folder while the run wrote to it; nothing more was saved"
                raise UserError("--output", self._output, ", ".join([allowed, *said]))
            make_folder("--output", self._output)
        return said


def metrics_path_of(settings: TrainSettings | TeacherSettings) -> Path:
    """Return the path of a run's metrics. run.json is in the same folder."""
    return settings.logs / settings.output.resolve().name / METRICS_NAME


def folder_of_record(folder: Path) -> Path | None:
    """Return the checkpoints' folder of the run that logs to `folder`, or None without a valid run.json made there."""
    try:
        record = read_record(folder) or {}
        settings = record["settings"]
        output, logs = Path(settings["output"]), Path(settings["logs"])
        here = (logs / output.resolve().name).resolve() == folder.resolve()
        checkpoints = Path(record.get("checkpoints", output))
    except (UserError, OSError, ValueError, TypeError, KeyError, RuntimeError):  # RuntimeError: links that form a loop
        return None
    return checkpoints if here else None


def is_elsewhere(path: Path, folder: Path) -> bool:
    """Return whether the checkpoint at `path` is in another folder than the run's."""
    return path.resolve().parent != folder.resolve()


def set_others_metrics_aside(path: Path, run: Run, resumed: bool) -> None:
    """Rename the metrics at `path` if they belong to another run, so that `run` neither continues nor replaces them.

    The samples beside them are renamed too.

    The metrics belong to `run` if run.json says so. If `run` resumes from a checkpoint in another folder, the settings
    in run.json must be its own, too. Without a valid run.json, as in a copied folder, a resumed run compares the
    metrics with figures in its checkpoint: the best evaluation, or the tokens of its step if there was none.
    """
    if not path.exists() or not path.stat().st_size:
        return
    owner = folder_of_record(path.parent)
    if owner is not None and owner.resolve() == run.folder.resolve():
        wanted = run.settings.resume
        if not resumed or wanted == "auto" or not is_elsewhere(Path(wanted), run.folder) or _recorded(path, run):
            return
    elif resumed and _are_of(path, run):
        return
    parts = (path, path.with_name(SAMPLES_NAME))
    names = names_aside(*parts)
    for part, aside in zip(parts, names, strict=True):
        if part.exists():
            part.rename(aside)
    said = f"{path} belongs to another run. It is renamed to {names[0].name}, and this run starts a new file."
    warn(f"warning: {said}")


def _recorded(path: Path, run: Run) -> bool:
    """Return whether the run.json beside the metrics at `path` has the settings of `run`, as far as it tells them."""
    record = read_record(path.parent) or {}
    then = record["settings"] | {name: record.get(name) for name in ("data", "signals")}
    names = run.identity.keys() & then.keys() - {*LENGTHS, "start_from"}  # by its hash in the identity
    told = {name: then[name] for name in names if then[name] not in (None, "auto") and run.identity[name] != "auto"}
    return all(run.identity[name] == value for name, value in told.items())


def _are_of(path: Path, run: Run) -> bool:
    """Return whether the metrics at `path` have the figures that the checkpoint of `run` holds."""
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


# Settings whose value may be decided by others, by the text or by the signals.
DECIDED = ("tail", *ModelSettings().decided())


def write_run_record(folder: Path, run: Run) -> None:
    """Write `folder`/run.json: what `run` is, where its checkpoints are, and whether it has finished.

    Raises:
        UserError: it can't be written.
    """
    for leftover in folder.glob(".*.tmp"):  # a killed process left it: we hold the folder's lock
        leftover.unlink()
    # Relative paths would mean other folders to a command that runs elsewhere.
    settled = {name: str(getattr(run.settings, name).resolve()) for name in ("output", "logs")}
    settled |= {name: run.identity[name] for name in DECIDED if name in run.identity}
    record = {
        "settings": {"strategy": run.name} | run.settings.model_dump(mode="json") | settled,  # a teacher's have none
        "data": run.identity["data"],
        "signals": run.identity.get("signals"),
        "checkpoints": str(run.folder.resolve()),
        "total_steps": run.total_steps,
        "planned_steps": run.plan.planned_steps,
        "finished": run.finished,
    }
    content = json.dumps(record, indent=2) + "\n"
    try:
        write_text(folder / RECORD_NAME, content)
    except OSError as error:
        raise not_written("--logs", folder / RECORD_NAME, len(content), error) from None
