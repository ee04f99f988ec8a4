"""The runs of a plan. Each task holds everything that decides its run, so that any process can do it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indraquantum.ablation.plan import Overrides, Plan, resolved
from indraquantum.ablation.results import Result, Results, check_result, read_result
from indraquantum.ablation.sizes import Sizes, planned_steps, sizes_of, within_budget
from indraquantum.config import AblateSettings, TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepared import PreparedDataset
from indraquantum.errors import UserError
from indraquantum.evaluation.halves import Half, documents_of_half
from indraquantum.files import combined_sha256
from indraquantum.strategy import resolve
from indraquantum.teacher.signals import SignalStore, open_signals
from indraquantum.training.plan import plan_run
from indraquantum.training.run import run_identity
from indraquantum.training.signals import find_signals
from indraquantum.versions import versions

# Variables that a hook of git sets, which name another repository than that of the program.
OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")


@dataclass(frozen=True)
class Task:
    """One run."""

    name: str  # of its JSON and its work folder
    planned: Result  # all that decides the run, as plain values: see results.check_result
    settings: TrainSettings
    result: Path  # the JSON to write
    measured_with: Path | None  # signals to correlate the readouts with
    origin: Result  # commit, command, versions
    keep_checkpoint: bool

    def record(self) -> Result | None:
        """Return the content of the run's JSON file, or None if the run is not done.

        Raises:
            UserError: the file belongs to another run.
        """
        record = read_result(self.result)
        if record is not None:
            check_result(self.result, record, self.planned)
        return record


class Bench:
    """A plan with open data. It makes the tasks, and checks that their comparison is fair.

    Args:
        plan: the plan, with its `data` and `signals`.
        settings: the settings of the command.
        results: the folder for the JSON files.
        work: the folder for checkpoints and logs of unfinished runs.
        command: the command line, for the record.
    """

    def __init__(self, plan: Plan, settings: AblateSettings, results: Path, work: Path, command: str) -> None:
        self.plan, self.settings, self.results, self.work = plan, settings, results, work
        if plan.data.is_file():
            raise UserError("--data", plan.data, "must be the packed folder, which has a tokenizer")
        self.dataset: PreparedDataset = open_dataset("--data", plan.data)
        self._stores: dict[Path, SignalStore] = {}
        self.measured_with = self._covering_held_out(plan.signals)
        self._origin = {"commit": commit(), "command": command, "versions": versions("torch", "transformers", "numpy")}

    @property
    def shared(self) -> Result:
        """What all runs must have in common, for `read_results`."""
        yardstick = self.measured_with and self._store(self.measured_with)
        return {
            "data": self.dataset.content_sha256,
            "readouts_measured_with": yardstick and _held_out_sha256(yardstick),
        }

    def _covering_held_out(self, path: Path | None) -> Path | None:
        if path is None:
            return None
        store = self._store(path)
        return path if store.coverage_by_split["validation"] > 0 and not store.manifest.served else None

    def _store(self, path: Path) -> SignalStore:
        if path not in self._stores:
            self._stores[path] = open_signals("--signals", path, self.dataset)
        return self._stores[path]

    def run(self, variant: str, seed: int, chosen: Overrides) -> Task:
        """Return the run of `variant` with `seed`, measured on the table half."""
        return self._task(f"{variant}-seed{seed}", variant, seed, chosen, "table")

    def trial(self, variant: str, number: int) -> Task:
        """Return the trial of the search's setting `number` for `variant`, measured on the choice half."""
        search, chosen = self.plan.search, self.plan.grid_of(variant)[number]
        whole = planned_steps(self._train_settings("", variant, search.seed, chosen), self.dataset)
        steps = max(1, round(whole * search.fraction))
        return self._task(f"search/{variant}-try{number}", variant, search.seed, chosen, "choice", max_steps=steps)

    def settings_of(self, variant: str) -> list[TrainSettings]:
        """Return the settings with which `variant` may run: its own, or those of its search."""
        seed = self.plan.seeds[0]
        return [self.run(variant, seed, chosen).settings for chosen in self.plan.grid_of(variant) or ({},)]

    def _train_settings(self, name: str, variant: str, seed: int, chosen: Overrides) -> TrainSettings:
        settings = resolved(
            self.plan, variant, chosen, data=self.plan.data, signals=self.plan.signals, seed=seed,
            output=self.work / name, logs=(self.work / "logs" / name).parent, device=self.settings.device,
            threads=self.settings.threads,
        )  # fmt: skip
        budget = self.plan.budgets.get(variant)
        return settings if budget is None else within_budget(settings, budget, self.dataset)

    def _task(self, name: str, variant: str, seed: int, chosen: Overrides, half: Half, **changes: Any) -> Task:
        settings = self._train_settings(name, variant, seed, chosen).model_copy(update=changes)
        taught = resolve(settings).asks_the_teacher
        if settings.signals is None and taught:
            allowed = "must be given, or set no_teacher: true"
            raise UserError(f"variants.{variant}.signals", "none", allowed)
        store = self._store(settings.signals) if taught else None
        planned = {
            "variant": variant,
            "half": half,
            "chosen": chosen,
            "readouts_measured_with": self.shared["readouts_measured_with"],
            "settings": self._identity(settings, store),
        }
        return Task(
            name, planned, settings, self.results / f"{name}.json", self.measured_with, self._origin,
            self.settings.keep_checkpoints,
        )  # fmt: skip

    def _identity(self, settings: TrainSettings, store: SignalStore | None) -> Result:
        """Return what decides a run; its stages only if they differ from the default's, as in older JSON files."""
        identity = run_identity(settings, find_signals(plan_run(settings, self.dataset), opened=store))
        if settings.strategy == TrainSettings.model_fields["strategy"].default:
            del identity["stages"]
        return identity | {"strategy": Path(settings.strategy).name}

    def check(self) -> None:
        """Check that every variant can be built, and that rows and sizes agree where the plan wants them to.

        A variant with a search is checked in each setting that it may choose.

        Raises:
            UserError: a variant does not fit, or no documents are held out for the search.
        """
        sizes: dict[str, list[Sizes]] = {}
        first, expected = next(iter(self.plan.variants)), None
        for variant in self.plan.variants:
            try:
                possible = self.settings_of(variant)
                sizes[variant] = [sizes_of(settings, self.dataset) for settings in possible]
            except UserError as error:
                raise UserError(f"variants.{variant}: {error.field}", error.value, error.allowed) from None
            for settings in possible:
                if self.plan.grid_of(variant) and resolve(settings).stages[0].fraction is None:
                    allowed = "must have stages given as fractions of the run, because the search trains shorter runs"
                    raise UserError(f"variants.{variant}.strategy", settings.strategy, allowed)
                rows = self._rows_seen(settings)
                expected = rows if expected is None else expected
                if self.plan.equal_rows and rows != expected:
                    allowed = f"must train on as many rows as variant {first} ({expected:,}), not {rows:,}"
                    raise UserError("variants", variant, allowed)
        for field, of in (("equal_parameters", "parameters"), ("equal_work", "flops_per_token")):
            for group in getattr(self.plan, field):
                _require_equal(field, {variant: [getattr(size, of) for size in sizes[variant]] for variant in group})
        if self.plan.search is not None and not documents_of_half(self.dataset, "choice").any():
            raise UserError(
                "--data",
                self.plan.data,
                "must hold out at least two different documents of a source, because the plan has a search",
            )

    def check_results(self, found: Results) -> None:
        """Check that `found` holds runs and trials of this plan on these data, of variants that are not run now too.

        Raises:
            UserError: one is another run; the message names its file and the first difference.
        """
        for variant, by_seed in found.runs.items():
            for seed, record in by_seed.items():
                self.run(variant, seed, record["chosen"]).record()
        for variant, tried in found.trials.items():
            for number, record in enumerate(tried):
                if record is not None:
                    self.trial(variant, number).record()

    def _rows_seen(self, settings: TrainSettings) -> int:
        """Return how many rows a run reads, repeats included, as if the last step of each epoch were a full one."""
        plan = plan_run(settings, self.dataset)
        rows = sum(stage.steps * stage.rows_per_step for stage in plan.stages)
        fractions = plan.strategy.stages[0].fraction is not None
        return min(rows, settings.epochs * self.dataset.train.num_rows) if fractions else rows


def _require_equal(field: str, sizes: dict[str, list[float]]) -> None:
    """Check that the sizes of a group's variants agree within 1 %."""
    every = [size for found in sizes.values() for size in found]
    if max(every) > 1.01 * min(every):
        said = ", ".join(f"{v} {' or '.join(f'{n:,.0f}' for n in dict.fromkeys(sizes[v]))}" for v in sizes)
        raise UserError(field, " ".join(sizes), f"must agree within 1 %: {said}")


def _held_out_sha256(store: SignalStore) -> str:
    """Return a hash of the signals of the held-out rows, which does not change while other rows are captured."""
    return combined_sha256(entry.sha256 for entry in store.manifest.shards if entry.split == "validation")


def commit() -> str | None:
    """Return the commit of the program, with `+changes` if files differ from it; None outside its repository.

    An installed package may lie within a repository of the user, who does not track it there.
    """
    here = Path(__file__).parents[1]  # the whole package
    environment = {name: value for name, value in os.environ.items() if name not in OTHER_REPOSITORY}
    tracked = ["git", "ls-files", "--error-unmatch", "__init__.py"]
    try:
        commands = (tracked, ["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", "."])
        _, head, changes = (
            subprocess.run(
                command, cwd=here, env=environment, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")
