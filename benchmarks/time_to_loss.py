"""How many minutes training takes to reach a held-out loss, for any builds and options side by side.

    python benchmarks/time_to_loss.py benchmarks/time_to_loss.yaml
    python benchmarks/time_to_loss.py benchmarks/time_to_loss.yaml --only now,dfedceb --seeds 0

The plan names the runs. Each has a commit (its source is unpacked from git and runs with this Python), options of
`indra train`, the numbers of steps to try, and the minutes that it needs beforehand, such as for a teacher's signals.
An older commit may need data of its own format. The learning rate falls to the end of a run, so a loss is reached
soonest by a run of the right length: give several.

The time counts from the start of the command, so imports are in it. Evaluations are not counted, and a loss between two
of them is interpolated. The runs take turns, seed by seed. Run it on an idle machine. Finished runs have a JSON file
each in the output folder, and the same command runs only those that are missing. A run of other options than the plan's
is refused; the table says which commits ran.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LLAMA = Path(__file__).with_name("llama_trainer.py")


def main() -> None:
    """Run what is missing, and print the table and draw the picture of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--only", help="names of runs, with commas")
    parser.add_argument("--seeds", help="numbers, with commas, instead of the plan's")
    parser.add_argument("--output", type=Path, help="default: results/NAME of the plan")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.plan.read_text(encoding="utf-8"))
    output = arguments.output or ROOT / "results" / plan["name"]
    output.mkdir(parents=True, exist_ok=True)
    names = arguments.only.split(",") if arguments.only else list(plan["runs"])
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else plan["seeds"]
    list(records_of(plan, output))  # before hours of training
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in itertools.product(() if arguments.report_only else seeds, names):
            for steps in plan["runs"][name]["steps"]:
                path = path_of(output, name, steps, seed)
                if not path.exists():
                    data = arguments.plan.parent / plan["runs"][name].get("data", plan["data"])
                    record = measured(plan, name, steps, seed, data.resolve(), Path(folder))
                    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                    print(f"{path.stem}: {record['curve'][-1][0] / 60:.1f} minutes, {record['curve'][-1][1]:.3f} nats")
    records = list(records_of(plan, output))
    table = as_table(plan, records)
    (output / "report.md").write_text(f"# {plan['about']}\n\n{table}\n", encoding="utf-8")
    print(table)
    draw(plan, records, output / "loss_over_minutes.png")


def measured(plan: dict[str, Any], name: str, steps: int, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train one run and return its curve: seconds since the start of the command, and the held-out loss."""
    run = plan["runs"][name]
    work = Path(tempfile.mkdtemp(dir=folder))
    stated = options_of(plan, name, steps, seed)
    options = stated | {"data": data, "output": work / "run", "logs": work / "logs"}
    words = list(itertools.chain.from_iterable(as_option(*option) for option in options.items()))
    command = [sys.executable, *([str(LLAMA)] if run.get("llama") else ["-m", "indraquantum", "train"]), *words]
    environment = os.environ | {"PYTHONPATH": str(source_of(run.get("commit"), folder)), "HF_HUB_OFFLINE": "1"}
    metrics, start = work / "logs" / "run" / "metrics.jsonl", time.monotonic()
    with (work / "output.txt").open("w+") as said:
        process = subprocess.Popen(command, env=environment, cwd=work, stdout=said, stderr=said)
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.05)
        start_seconds = time.monotonic() - start
        if process.wait():
            said.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\n{said.read()}")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    record = {
        "name": name, "seed": seed, "steps": steps, "commit": run.get("commit") or head(),
        "options": {key: str(value) for key, value in stated.items()},
        "minutes_before": run.get("minutes_before", 0), "whole_seconds": round(time.monotonic() - start, 1),
        "curve": curve_of(lines, start_seconds),
    }  # fmt: skip
    shutil.rmtree(work)
    return record


def options_of(plan: dict[str, Any], name: str, steps: int, seed: int) -> dict[str, Any]:
    """Return the options of a run, but for its data and folders."""
    return plan.get("base", {}) | plan["runs"][name].get("options", {}) | {"max_steps": steps, "seed": seed}


def path_of(output: Path, name: str, steps: int, seed: int) -> Path:
    """Return the file of a run."""
    return output / f"{name}-{steps}-seed{seed}.json"


def records_of(plan: dict[str, Any], output: Path) -> Iterator[dict[str, Any]]:
    """Yield the finished runs of the plan. One of other options, or of another commit than the plan names, ends it."""
    for name, run in plan["runs"].items():
        for steps, seed in itertools.product(run["steps"], plan["seeds"]):
            path = path_of(output, name, steps, seed)
            if path.exists():
                record = json.loads(path.read_text(encoding="utf-8"))
                stated = {key: str(value) for key, value in options_of(plan, name, steps, seed).items()}
                wanted = stated | {"commit": run.get("commit", record["commit"])}
                wanted["evaluate_every"] = record["options"]["evaluate_every"]  # evaluations are not in the time
                if record["options"] | {"commit": record["commit"]} != wanted:
                    sys.exit(f"{path}: is of other options or of another commit than the plan's; remove it")
                yield record


def curve_of(lines: list[dict[str, Any]], seconds: float) -> list[tuple[float, float, int]]:
    """Return seconds, held-out loss and tokens at each evaluation; `seconds` had passed before the first step."""
    tokens, points = 0, []
    for line in lines:
        if line["tokens_per_second"]:
            seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
        tokens = line["tokens"]
        if line["held_out"]:
            points.append((round(seconds, 2), line["held_out"]["all"], tokens))
    return points


def as_option(name: str, value: Any) -> list[str]:
    """Return the words of one option; true is a flag, and false leaves it out."""
    flag = "--" + name.replace("_", "-")
    return [] if value is False else [flag] if value is True else [flag, str(value)]


def source_of(commit: str | None, folder: Path) -> Path:
    """Return the source of a commit, unpacked once; None is the working tree."""
    if commit is None:
        return ROOT / "src"
    target = folder / commit
    if not target.exists():
        packed = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(target, filter="data")
    return target / "src"


def head() -> str:
    """Return the commit of the working tree."""
    command = ["git", "describe", "--always", "--dirty=+changes"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def minutes_to(record: dict[str, Any], target: float) -> float:
    """Return the minutes until the held-out loss was first at `target` or below; infinity if never.

    Between two evaluations the loss counts as a straight line, so that runs with few evaluations are not late.
    """
    for (earlier, before, _), (seconds, loss, _) in itertools.pairwise(record["curve"]):
        if loss <= target:
            part = (before - target) / (before - loss)
            return record["minutes_before"] + (earlier + part * (seconds - earlier)) / 60
    return float("inf")


def best_minutes(records: list[dict[str, Any]], target: float) -> tuple[float, bool]:
    """Return the median minutes to `target` over the seeds at the best number of steps, and whether it was reached.

    If it was not, the minutes are those of the longest run.
    """
    medians, longest = [], 0.0
    for steps in {record["steps"] for record in records}:
        alike = [record for record in records if record["steps"] == steps]
        medians.append(statistics.median(minutes_to(record, target) for record in alike))
        longest = max(longest, *(record["minutes_before"] + record["curve"][-1][0] / 60 for record in alike))
    best = min(medians, default=float("inf"))
    return (longest, False) if best == float("inf") else (best, True)


def as_table(plan: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Return a Markdown table: minutes to each target, and how many times as long the plan's first run took.

    "more than" stands where a run ended before it reached the target.
    """
    targets, first, rows = plan["targets"], {}, []
    for name in plan["runs"]:
        mine, cells = [record for record in records if record["name"] == name], []
        for target in targets if mine else ():
            minutes, reached = best_minutes(mine, target)
            first.setdefault(target, (minutes, reached))
            if reached:
                bound = "" if first[target][1] else "more than "
                cells.append(f"{minutes:.1f} ({bound}{first[target][0] / minutes:.2f}x)")
            else:
                cells.append(f"more than {minutes:.1f}")
        if mine:
            runs = ", ".join(f"{steps} x {number}" for steps, number in Counter(r["steps"] for r in mine).items())
            commits = ", ".join(sorted({record["commit"] for record in mine}))
            rows.append(f"| {name} | {commits} | {runs} | {' | '.join(cells)} |")
    header = f"| minutes to | commit | steps x seeds | {' | '.join(f'{target:g} nats' for target in targets)} |"
    return "\n".join([header, "|---" * (len(targets) + 3) + "|", *rows])


def draw(plan: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Draw the held-out loss over the minutes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, name in enumerate(plan["runs"]):
        for record in (record for record in records if record["name"] == name):
            minutes = [record["minutes_before"] + seconds / 60 for seconds, _, _ in record["curve"]]
            losses = [loss for _, loss, _ in record["curve"]]
            label = name if not any(line.get_label() == name for line in axes.lines) else None
            axes.plot(minutes, losses, color=f"C{number}", label=label, linewidth=1)
    losses = [loss for record in records for _, loss, _ in record["curve"]]
    limits = (min(losses) - 0.1, min(max(losses), max(plan["targets"]) + 1.5))
    axes.set(xlabel="minutes since the start", ylabel="held-out cross-entropy, nats per token", ylim=limits)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
