"""Which of a variant's settings is best on the choice half; nothing here looks at the table half."""

from __future__ import annotations

from typing import NamedTuple

from indraquantum.ablation.plan import Overrides
from indraquantum.ablation.tasks import Bench, Task
from indraquantum.errors import UserError


class Trial(NamedTuple):
    """One setting that was tried for a variant."""

    setting: Overrides
    cross_entropy: float | None  # on the choice half, nats per token; None where it failed or is still to be done
    line: str | None  # why it failed
    done: bool  # has its JSON, whichever way it ended


def trial_tasks(bench: Bench, variant: str) -> list[Task]:
    """The trials of `variant`, in the order of its grid."""
    return [bench.trial(variant, number) for number in range(len(bench.plan.grid_of(variant)))]


def trials_of(bench: Bench, variant: str) -> list[Trial]:
    """What is known of each trial of `variant`."""
    trials = []
    for task in trial_tasks(bench, variant):
        record = task.record()
        done = record is not None and record["status"] == "finished"
        loss = record["sources"]["all"]["cross_entropy"] if done else None
        trials.append(Trial(task.planned["chosen"], loss, record.get("line") if record else None, record is not None))
    return trials


def best_setting(variant: str, trials: list[Trial]) -> Overrides:
    """The setting with the lowest cross-entropy, the first of equals; nothing to change where nothing was searched.

    Raises:
        UserError: a trial is still to be done, or none came to its end.
    """
    if not trials:
        return {}
    if not all(trial.done for trial in trials):
        raise UserError("search", variant, "has trials that are still to be done")
    finished = [trial for trial in trials if trial.cross_entropy is not None]
    if not finished:
        raise UserError("search", variant, "has no setting whose trial came to its end")
    return min(finished, key=lambda trial: trial.cross_entropy).setting
