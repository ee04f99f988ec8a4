"""Finds the best setting of a variant on the choice half. Nothing here reads the table half."""

from __future__ import annotations

from typing import NamedTuple

from indraquantum.ablation.plan import Overrides
from indraquantum.ablation.tasks import Bench, Task
from indraquantum.errors import UserError


class Trial(NamedTuple):
    """One setting that was tried for a variant."""

    setting: Overrides
    cross_entropy: float | None  # on the choice half, nats per token; None if it failed or is not done
    line: str | None  # why it failed
    done: bool  # has its JSON file, finished or failed


def trial_tasks(bench: Bench, variant: str) -> list[Task]:
    """Return the trials of `variant`, in the order of its grid."""
    return [bench.trial(variant, number) for number in range(len(bench.plan.grid_of(variant)))]


def trials_of(bench: Bench, variant: str) -> list[Trial]:
    """Return the result of each trial of `variant`."""
    trials = []
    for task in trial_tasks(bench, variant):
        record = task.record()
        done = record is not None and record["status"] == "finished"
        loss = record["sources"]["all"]["cross_entropy"] if done else None
        trials.append(Trial(task.planned["chosen"], loss, record.get("line") if record else None, record is not None))
    return trials


def best_setting(variant: str, trials: list[Trial]) -> Overrides:
    """Return the setting with the lowest cross-entropy, or no options if nothing was searched.

    Raises:
        UserError: a trial is not done, or none finished.
    """
    if not trials:
        return {}
    if not all(trial.done for trial in trials):
        raise UserError("search", variant, "has trials that are not finished")
    finished = [trial for trial in trials if trial.cross_entropy is not None]
    if not finished:
        raise UserError("search", variant, "has no setting whose trial finished")
    return min(finished, key=lambda trial: trial.cross_entropy).setting
