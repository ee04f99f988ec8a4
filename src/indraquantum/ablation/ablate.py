"""The command `indra ablate`: trains variants x seeds at equal training tokens and writes one report. It can resume."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from indraquantum.ablation.final import measure_finally
from indraquantum.ablation.one_run import drop_checkpoints
from indraquantum.ablation.plan import Plan, load_plan
from indraquantum.ablation.processes import run_tasks
from indraquantum.ablation.report import write_report
from indraquantum.ablation.results import read_results
from indraquantum.ablation.search import best_setting, trial_tasks, trials_of
from indraquantum.ablation.sizes import sizes_of
from indraquantum.ablation.tasks import Bench, Task
from indraquantum.config import AblateSettings
from indraquantum.device import choose_device
from indraquantum.errors import UserError, as_option
from indraquantum.evaluation.test_split import require_test_split
from indraquantum.files import folder_lock, make_folder
from indraquantum.kernels.onednn import note_slow_16_bits
from indraquantum.tables import text_table


def ablate(path: Path, settings: AblateSettings) -> Path | None:
    """Train the unfinished runs of the plan at `path` and write the report.

    Returns:
        The path of the report; None after a dry run.

    Raises:
        UserError: the plan, data or signals don't fit, the results are of another plan, or some runs failed. The
            finished runs have their JSON files and are in the report.
        Interrupted: a signal came; the same command resumes.
    """
    plan = load_plan(path)
    plan = plan.model_copy(update={"data": settings.data or plan.data, "signals": settings.signals or plan.signals})
    results = settings.output or Path("results") / plan.name
    _check_together(settings)
    if settings.report_only:
        return write_report(plan, results)
    command = command_line(path, settings)
    settings = settings.model_copy(update={"keep_checkpoints": settings.keep_checkpoints or settings.final})
    work = settings.work or Path("runs") / "ablate" / plan.name
    variants = _variants(plan, settings.only)
    bench = Bench(plan, settings, results, work, command)
    bench.check()
    if settings.final:
        require_test_split("--final", bench.dataset)
    _note_slow_precisions(bench, variants)
    if settings.dry_run:
        print(overview(bench, variants))
        return None
    make_folder("--output", results)
    bench.check_results(read_results(plan, results, bench.shared))  # before hours of training
    with folder_lock("--work", make_folder("--work", work)):
        without = _run(bench, [task for variant in variants for task in trial_tasks(bench, variant)])
        tasks = []
        for variant in variants:
            try:
                chosen = best_setting(variant, trials_of(bench, variant))
            except UserError as error:
                without.append(str(error))
                continue
            tasks += [bench.run(variant, seed, chosen) for seed in plan.seeds]
        # Seed by seed, so that a stopped ablation has complete pairs.
        without += _run(bench, sorted(tasks, key=lambda task: plan.seeds.index(task.settings.seed)))
        missing = without and UserError(
            "ablate", path, f"{len(without)} runs have no result; the first of them: {without[0]}"
        )
        if settings.final and not missing:
            measure_finally(bench, tasks, command)
    try:
        report = write_report(plan, results)
    except UserError as error:
        raise missing or error from None
    if missing:
        raise missing
    return report


def _check_together(settings: AblateSettings) -> None:
    """Refuse options that contradict each other."""
    alone = {"--report-only": settings.report_only, "--final": settings.final}
    others = {"--dry-run": settings.dry_run, "--only": settings.only, "--final": settings.final}
    for option, why in (
        ("--report-only", "which trains nothing and reports on all runs"),
        ("--final", "which measures all runs of the plan once they are done"),
    ):
        for other, given in others.items():
            if alone[option] and given and other != option:
                raise UserError(other, "given", f"must not be given together with {option}, {why}")


def _variants(plan: Plan, only: tuple[str, ...] | None) -> list[str]:
    for name in only or ():
        if name not in plan.variants:
            raise UserError("--only", name, f"must be one of the variants {', '.join(plan.variants)}")
    return [variant for variant in plan.variants if not only or variant in only]


def _note_slow_precisions(bench: Bench, variants: list[str]) -> None:
    """Say here, and not only in the logs of the runs, if this processor is slow in a number format of the plan."""
    if bench.settings.device not in ("auto", "cpu"):
        return
    device = choose_device(bench.settings)
    for precision in sorted({settings.precision for variant in variants for settings in bench.settings_of(variant)}):
        if precision != "auto":
            note_slow_16_bits(device, precision)


def _run(bench: Bench, tasks: list[Task]) -> list[str]:
    """Train those of `tasks` that have no JSON file yet; return a line for each that has none afterwards."""
    records = [task.record() for task in tasks]
    left = [task for task, record in zip(tasks, records, strict=True) if record is None]
    if len(left) < len(tasks):
        print(f"{len(tasks) - len(left)} of {len(tasks)} runs are already done.")
    for task, record in zip(tasks, records, strict=True):
        if record is not None and not record.get("checkpoint_kept"):
            drop_checkpoints(task)  # of a process that was killed just before
    return run_tasks(left, bench.settings.jobs, print)


def overview(bench: Bench, variants: list[str]) -> str:
    """Return what would be trained: a line for each variant and size that its search may choose.

    A line has the trials of its size. The first line of a variant has its runs, which take one of these sizes.
    """
    plan = bench.plan
    first = sizes_of(bench.settings_of(next(iter(plan.variants)))[0], bench.dataset)
    rows = []
    for variant in variants:
        tried = Counter(sizes_of(settings, bench.dataset) for settings in bench.settings_of(variant))
        for number, (sizes, trials) in enumerate(tried.items()):
            rows.append([
                variant, f"{sizes.parameters:,}", f"{sizes.parameters / first.parameters:.3f}",
                f"{sizes.table_parameters / sizes.parameters:.1%}", f"{sizes.flops_per_token / 1e6:.3f}",
                f"{sizes.steps:,}", f"{sizes.tokens:,}", str(trials if plan.grid_of(variant) else 0),
                "" if number else str(len(plan.seeds)),
            ])  # fmt: skip
    header = ["variant", "parameters", "of first", "in table", "MFLOP/token", "steps", "tokens", "trials", "runs"]
    return text_table(header, rows)


def command_line(path: Path, settings: AblateSettings) -> str:
    """Return the command as it could be typed."""
    words = ["indra", "ablate", str(path)]
    for name in sorted(settings.model_fields_set):
        value, option = getattr(settings, name), as_option(name)
        for part in value if isinstance(value, tuple) else (value,):
            words += [option] if part is True else [option, str(part)]
    return shlex.join(words)
