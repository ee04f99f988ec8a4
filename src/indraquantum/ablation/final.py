"""The final figures of a plan: every finished run is measured on the test split, once, after all choices are made.

They are in `final.json` beside the runs' JSON files. It is written only once: the same command again takes the figures
from there and does not read the test split.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from indraquantum.ablation.results import Result, check_checkpoint, read_result
from indraquantum.ablation.tasks import Bench, Task
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.evaluation.figures import figures_by_source, predict
from indraquantum.evaluation.halves import bytes_by_source
from indraquantum.evaluation.test_split import read_test_split
from indraquantum.files import check_manifest_json, read_json, sha256_of, without_nan, write_manifest_json
from indraquantum.inference.load import load_model
from indraquantum.training.checkpoint import checkpoint_path, load_checkpoint
from indraquantum.training.plan import plan_run

FORMAT = "indraquantum-ablation-final"
FORMAT_VERSION = 1
NAME = "final.json"


def measure_finally(bench: Bench, tasks: list[Task], command: str) -> None:
    """Measure the finished runs of `tasks`, which are all of a plan, on the test split, unless it was done before.

    Raises:
        UserError: the data have no test split, a run or its checkpoint is missing, all runs failed, the figures that
            are there are of other runs, or the reading can't be recorded. The test split is not read then.
    """
    path = bench.results / NAME
    finished = [task for task in tasks if _finished(task)]
    if (final := read_final(bench.results)) is not None:
        if others := sorted(final["runs"].keys() ^ {task.name for task in finished}):
            raise UserError(
                "--final",
                path,
                f"must hold the plan's finished runs, but differs in {', '.join(others)}: use --report-only, or remove "
                f"{NAME} and read the test split once more",
            )
        return
    if not finished:
        raise UserError("--final", bench.results, "must hold a finished run of this plan, but all of its runs failed")
    checkpoints = [_checkpoint(bench, task) for task in finished]
    reading = read_test_split("--final", bench.plan.data, bench.dataset, command)
    print(reading)
    device, source_bytes = choose_device(bench.settings), bytes_by_source(bench.dataset, reading.split)
    runs = {}
    for task, checkpoint in zip(finished, checkpoints, strict=True):
        model, _ = load_model(checkpoint, device)
        sources = figures_by_source(predict(model, reading.split, device), source_bytes)
        runs[task.name] = {
            "variant": task.planned["variant"],
            "seed": task.settings.seed,
            "result_sha256": sha256_of(task.result),
            "sources": {name: asdict(figures) for name, figures in sources.items()},
        }
    write_manifest_json(path, without_nan({
        "format": FORMAT, "format_version": FORMAT_VERSION, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": bench.dataset.content_sha256, "documents": reading.split.num_documents,
        "earlier_readings": list(reading.earlier), "runs": runs,
    }))  # fmt: skip


def _finished(task: Task) -> bool:
    record = task.record()
    if record is None:
        raise UserError("--final", task.name, "must be trained first: this run has no JSON file")
    return record["status"] == "finished"


def _checkpoint(bench: Bench, task: Task) -> Path:
    """Return the path of a finished run's last checkpoint, once it is clear that it is this run's."""
    plan = plan_run(task.settings, bench.dataset)
    path = checkpoint_path(task.settings.output, plan.epoch_of(plan.total_steps))
    if not path.exists():
        allowed = (
            "must still have its checkpoint; to train the plan again with --final, give another --output and --work"
        )
        raise UserError("--final", task.name, allowed)
    check_checkpoint(task.settings.output, load_checkpoint("--final", path).settings, task.planned)
    return path


def read_final(folder: Path) -> Result | None:
    """Return the final figures of the runs in `folder`, or None if there are none.

    Raises:
        UserError: the file is damaged, has another format, or belongs to other runs.
    """
    path = folder / NAME
    if not path.exists():
        return None
    check_manifest_json("results", path)
    found: Any = read_json("results", path)
    if not isinstance(found, dict) or (found.get("format"), found.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise UserError("results", path, f"must hold the final figures of a plan (format {FORMAT})")
    for name, run in found["runs"].items():
        result = folder / f"{name}.json"
        if read_result(result) is None or sha256_of(result) != run["result_sha256"]:
            raise UserError(
                "results", path, f"holds the figures of another run than the one in {result.name}; remove {NAME}"
            )
    return found
