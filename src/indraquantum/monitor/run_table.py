"""`indra runs` and `indra runs compare`: a table in a terminal, tab-separated lines where the output is piped.

rich draws the table in a terminal, because it folds long cells to the terminal's width; tables.py does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from indraquantum.errors import as_option
from indraquantum.monitor.runs import RunSummary, all_runs, named_runs

Row = Sequence[str]
NONE = "-"
LONGEST_CELL = 300


def list_runs(logs: Path) -> None:
    """Print a line for each run below `logs`."""
    runs = all_runs(logs)
    sources = _sources(runs)
    header = ["run", "strategy", "state", "steps", "tokens", "loss", *(f"{name} (best)" for name in sources)]
    print_table(header, [_row(run, sources) for run in runs])


def _row(run: RunSummary, sources: list[str]) -> list[str]:
    total = NONE if run.total_steps is None else f"{run.total_steps:,}"
    return [
        run.name,
        str(run.settings.get("strategy", NONE)),
        run.state,
        f"{run.steps:,}/{total}",
        f"{run.tokens:,}",
        _figure(run.loss),
        *(f"{_figure(run.last_held_out.get(s))} ({_figure(run.best_held_out.get(s))})" for s in sources),
    ]


def compare_runs(logs: Path, names: tuple[str, ...]) -> None:
    """Print where the runs called `names` differ in their settings, and their held-out figures side by side."""
    runs = named_runs(logs, names)
    print_table(["", *(run.name for run in runs)], [*differences(runs), *_figures(runs)])


def differences(runs: list[RunSummary]) -> list[list[str]]:
    """Return a row for each setting in which `runs` differ, except for the folders that they write to."""
    names = sorted({name for run in runs for name in run.settings} - {"output", "logs"})
    rows = [[as_option(name), *(str(run.settings.get(name, NONE)) for run in runs)] for name in names]
    return [[_short(cell) for cell in row] for row in rows if len(set(row[1:])) > 1]


def _figures(runs: list[RunSummary]) -> list[list[str]]:
    rows = [
        ["state", *(run.state for run in runs)],
        ["steps", *(f"{run.steps:,}" for run in runs)],
        ["tokens", *(f"{run.tokens:,}" for run in runs)],
        ["loss", *(_figure(run.loss) for run in runs)],
    ]
    for source in _sources(runs):
        rows.append([f"{source}, last", *(_figure(run.last_held_out.get(source)) for run in runs)])
        rows.append([f"{source}, best", *(_figure(run.best_held_out.get(source)) for run in runs)])
    return rows


def _sources(runs: list[RunSummary]) -> list[str]:
    """Return all held-out sources, in the order in which the runs name them, with `all` at the end."""
    names = dict.fromkeys(name for run in runs for name in run.last_held_out)
    return [name for name in names if name != "all"] + ["all"] * ("all" in names)


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _short(cell: str) -> str:
    """Shorten a hash to its first digits."""
    return cell[:12] if len(cell) == 64 and set(cell) <= set("0123456789abcdef") else cell


def _printable(cell: str) -> str:
    """Return a cell on one line and of limited length, even if a damaged file holds something else."""
    cell = cell if len(cell) <= LONGEST_CELL else f"{cell[:LONGEST_CELL]}..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in cell)


def print_table(header: Row, rows: list[list[str]]) -> None:
    """Print a table in a terminal, and tab-separated lines elsewhere."""
    header, *rows = ([_printable(cell) for cell in row] for row in (header, *rows))
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in [header, *rows]))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
