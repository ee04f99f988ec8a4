"""How long commands take from start to end, as whole processes, beside an older commit's.

    python benchmarks/startup.py

The older tree is unpacked from git into a temporary folder and runs with the same Python and packages. Each tree
prepares its own data from ../shared (see README.md there), because the format has changed. Both read the same
checkpoint: the default model, V = 32,000, after two steps. Commands of the two trees take turns. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


class Tree(NamedTuple):
    """One version of the program, and the data that it has prepared."""

    source: Path
    data: Path


class Cost(NamedTuple):
    """Seconds of one process."""

    clock: float
    cpu: float


def indra(tree: Tree, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start `indra` with `arguments`; `options` are Python's."""
    command = [sys.executable, *options, "-m", "indraquantum", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(tree.source), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the process wrote on stdout and stderr; stops where it failed."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)}\n{errors}")
    return output, errors


def cost(tree: Tree, *arguments: object) -> tuple[Cost, str]:
    """What `indra` with `arguments` costs, and what it prints."""
    before, start = os.times(), time.perf_counter()
    output, _ = finished(indra(tree, *arguments))
    clock, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(clock, cpu), output


def imported(tree: Tree, *arguments: object) -> Counter[str]:
    """Seconds that `indra` with `arguments` spends on importing, by package."""
    _, errors = finished(indra(tree, *arguments, options=("-X", "importtime")))
    seconds: Counter[str] = Counter()
    for microseconds, name in IMPORT.findall(errors):
        seconds[name.split(".")[0]] += int(microseconds) / 1e6
    return seconds


def prepare(tree: Tree, shared: Path) -> None:
    """Prepare 2,000 samples of WikiText and of Alpaca each."""
    texts = ("--wikitext", shared / "data/wikitext/wiki.train.tokens", "--wikitext-samples", 2000)
    instructions = ("--alpaca", shared / "data/alpaca/alpaca_data.json", "--alpaca-samples", 2000)
    places = ("--tokenizer", shared / "tokenizer", "--output", tree.data.with_suffix(".pkl"))
    finished(indra(tree, "prepare", *texts, *instructions, *places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="dfedceb", help="the older version")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of text and tokenizer")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command and tree")
    parser.add_argument("--only", default="", help="commands that contain this text")
    parser.add_argument(
        "--work", type=Path, help="keep what is prepared here, for another call (default: throw it away)"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.work or Path(temporary)
        checkpoint = folder / "run/checkpoint_v4_epoch_1.pt"
        trees = {
            chosen.commit: Tree(folder / "older/src", folder / "older/data/mixed"),
            "now": Tree(ROOT / "src", folder / "now/data/mixed"),
        }
        run = ("train", "--no-teacher", "--save-every", 1000, "--device", "cpu")
        if not checkpoint.exists():
            archive = subprocess.run(
                ["git", "archive", chosen.commit, "src"], cwd=ROOT, check=True, capture_output=True
            )
            (folder / "older").mkdir(parents=True)
            subprocess.run(["tar", "x", "-C", folder / "older"], input=archive.stdout, check=True)
            for tree in trees.values():
                prepare(tree, chosen.shared)
            first = ("--max-steps", 2, "--output", folder / "run", "--logs", folder / "logs")
            finished(indra(trees["now"], *run, "--data", trees["now"].data, *first))
        write = ("test", checkpoint, "--prompt", "The history of the city", "--max-new-tokens", 32)
        commands = {
            "test, 32 tokens": lambda tree: write,
            "eval": lambda tree: ("eval", checkpoint, "--data", tree.data),
            "train, 1 step": lambda tree: (
                *run, "--data", tree.data, "--max-steps", 1, "--output", tempfile.mkdtemp(dir=temporary), "--logs",
                tempfile.mkdtemp(dir=temporary),
            ),
            "runs": lambda tree: ("runs", "--logs", folder / "logs"),
            "data info": lambda tree: ("data", "info", tree.data),
            "--help": lambda tree: ("--help",),
            "capture --help": lambda tree: ("capture", "--help"),
        }  # fmt: skip
        print(f"| indra | {chosen.commit}: seconds, CPU | now: seconds, CPU | ratio |\n|---|---|---|---|")
        for name, arguments in commands.items():
            if chosen.only in name:
                print(compared(name, trees, arguments, chosen.rounds), flush=True)
        tables = {version: imported(tree, *write) for version, tree in trees.items()}
    print(f"\n| seconds of import, test | {' | '.join(tables)} |\n|---|{'---|' * len(tables)}")
    total = Counter({version: sum(table.values()) for version, table in tables.items()})
    packages = [name for name, seconds in (tables[chosen.commit] | tables["now"]).most_common() if seconds >= 0.02]
    for name in packages:
        print(f"| {name} | {' | '.join(f'{table[name]:.2f}' for table in tables.values())} |")
    print(f"| all | {' | '.join(f'{total[version]:.2f}' for version in tables)} |")


def compared(name: str, trees: dict[str, Tree], arguments, rounds: int) -> str:
    """A line of the table: medians of the runs of a command in each tree, which take turns."""
    costs: dict[str, list[Cost]] = {version: [] for version in trees}
    texts = set()
    for _ in range(rounds):
        for version, tree in trees.items():
            spent, text = cost(tree, *arguments(tree))
            costs[version].append(spent)
            texts.add(text)
    if name.startswith("test") and len(texts) > 1:
        sys.exit(f"The two versions write different texts: {texts}")
    medians = {version: Cost(*map(statistics.median, zip(*found, strict=True))) for version, found in costs.items()}
    older, now = medians.values()
    return f"| {name} | {older.clock:.2f}, {older.cpu:.2f} | {now.clock:.2f}, {now.cpu:.2f} | {now[0] / older[0]:.2f} |"


if __name__ == "__main__":
    main()
