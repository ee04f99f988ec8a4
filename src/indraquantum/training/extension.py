"""Another length for a run that has begun: more epochs or steps, with its optimiser and all.

    indra train --schedule constant --epochs 1 ...
    indra train --schedule constant --epochs 3 ...      the same command, longer

What is behind the run must not depend on its length. So the schedule of the stage under way must be constant, or wsd
that has not begun to decay. What rises with the progress, the warm-up and the curves of the loss weights, keeps the
length that the stage was begun with: the steps that are added have the last weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from indraquantum.training.schedule import decay_begins
from indraquantum.training.stages import RunStage, StagePlan

LENGTHS = ("epochs", "max_steps")  # options
STAGE_LENGTHS = ("steps", "planned_steps")  # in a stage's identity


class NotExtensible(Exception):
    """Why a run can't have another length, for a reader.

    Args:
        why: a clause.
        before: steps done until which it still could; 0 where it never could.
    """

    def __init__(self, why: str, before: int = 0) -> None:
        self.why, self.before = why, before
        super().__init__(why)


def without_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run apart from its length."""
    stages = {
        name: {key: value for key, value in stage.items() if key not in STAGE_LENGTHS}
        for name, stage in identity["stages"].items()
    }
    return {name: value for name, value in identity.items() if name not in LENGTHS} | {"stages": stages}


def extended(plan: StagePlan, before: Mapping[str, Any], step: int) -> StagePlan:
    """`plan` as what follows `step` steps of a run that was begun with another length, or the same.

    Args:
        plan: of the length that is asked for.
        before: what decided the run so far, of the same stages.
        step: optimiser steps done.

    Raises:
        NotExtensible: the steps that are done would have been others with this length.
    """
    stages = []
    for stage in plan.stages:
        then = before["stages"][stage.about.name]
        done = step - stage.first
        if done > 0 and then["steps"] != stage.steps:
            _check(stage, then["steps"], done)
        # A stage that has not begun has the length that it is given now.
        planned = then.get("planned_steps", then["steps"]) if done > 0 else None
        stages.append(replace(stage, planned_steps=None if planned == stage.steps else planned))
    return replace(plan, stages=tuple(stages))


def _check(stage: RunStage, steps_then: int, done: int) -> None:
    name, schedule = stage.about.name, stage.about.schedule
    if done > steps_then:
        raise NotExtensible(f"its stage {name} is over")
    if done > stage.steps:
        raise NotExtensible(f"it has done {stage.first + done:,} steps already")
    if schedule == "cosine":
        raise NotExtensible("its cosine schedule is tied to its length")
    if schedule == "wsd":
        begin = min(decay_begins(steps, stage.about.decay_fraction) for steps in (steps_then, stage.steps))
        if done > begin:
            raise NotExtensible(f"its learning rate decays from step {stage.first + begin:,} on", stage.first + begin)
