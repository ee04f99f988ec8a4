"""Plans a run for a number of minutes: the option `indra train --minutes`.

It times a few real steps, whose results are discarded, and chooses the number of steps. From then on the run is like
any other: what was chosen are its `max_steps`, `epochs` and `batch_tokens`. Its checkpoints hold them, so that the same
command resumes it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from typing import Any

import torch

from indraquantum.config import TrainSettings
from indraquantum.errors import UserError, as_option
from indraquantum.evaluation.held_out import batches, evaluation_fits, losses_of
from indraquantum.kernels.onednn import onednn_products
from indraquantum.kernels.ways import in_force, using
from indraquantum.launched import launched_processes
from indraquantum.progress import duration, tell
from indraquantum.strategy import resolve
from indraquantum.training.earlier import settings_of_checkpoint, with_former_shape
from indraquantum.training.loop import take_step
from indraquantum.training.plan import RunStage, rows_per_step
from indraquantum.training.resume import as_there
from indraquantum.training.run import FREE_SETTINGS, Run, check_resume, trial_run
from indraquantum.training.schedule import steps_per_epoch

BATCH_TOKENS = 2048  # better than the default of long runs for every length up to 10M tokens that was tried
FEWEST_STEPS = 20  # fewer teach nothing
WARM_UP, TIMED, SECONDS = 2, 3, 4.0  # steps before the timed ones; at least so many timed ones; for so long
# Held-out nats per token at the end of runs of so many tokens: the default model on WikiText and Alpaca, V = 32,000, no
# teacher (results/equal-time, wide-200 and wide-580; results/start-long, wide-table-0.002).
REACHED = ((0.41e6, 4.60), (1.19e6, 4.21), (3.07e6, 3.91))
# What may be otherwise than in the measured runs. All other options change the loss, or were not tried.
MAY_DIFFER = FREE_SETTINGS | {
    "seed", "epochs", "max_steps", "evaluate_every", "patience", "micro_batch_tokens", "compile", "precision",
    "softmax",
}  # fmt: skip


def within_minutes(settings: TrainSettings) -> TrainSettings:
    """Return `settings` with the number of steps for their `minutes`; unchanged if they have none.

    A run that was begun with the same number of minutes keeps its steps.

    Raises:
        UserError: the minutes are too few, another option sets the length, the run there has other minutes, or several
            processes would choose.
    """
    if settings.minutes is None:
        return settings
    settings = with_former_shape(settings)
    if launched_processes() > 1:
        allowed = "must be left out with several processes, which would choose different lengths; give --max-steps"
        raise UserError("--minutes", settings.minutes, allowed)
    for option in ("epochs", "max_steps"):
        if option in settings.model_fields_set and getattr(settings, option) is not None:
            allowed = "must be left out with --minutes, which chooses the number of steps"
            raise UserError(as_option(option), getattr(settings, option), allowed)
    fractions = [stage.fraction for stage in resolve(settings).stages]
    if None in fractions:
        allowed = f"must be left out with --strategy {settings.strategy}, whose stages set their own lengths"
        raise UserError("--minutes", settings.minutes, allowed)
    if (begun := _begun(settings)) is not None:
        return settings.model_copy(update=begun)
    started = time.perf_counter()
    given = {} if "batch_tokens" in settings.model_fields_set else {"batch_tokens": BATCH_TOKENS}
    epochs = math.ceil(1 / min(fractions))  # each stage has a step, of data of any size
    settings = settings.model_copy(update={"epochs": epochs} | given)
    with using(in_force()):  # a run takes the quickest way, which is not to outlast it
        run = trial_run(settings, counts_text=False)
        check_resume(settings.resume, settings.output, run.plan)
        seconds = step_seconds(run)
        evaluation = evaluation_seconds(run)
    steps = _steps_within(run, settings.minutes * 60 - (time.perf_counter() - started), seconds, evaluation)
    if steps < FEWEST_STEPS:
        least = math.ceil((FEWEST_STEPS * seconds + 3 * evaluation) / 60 + 1)
        raise UserError(
            "--minutes", settings.minutes, f"must be at least {least} here, where a step takes {seconds:.2g} s"
        )
    first = run.plan.stages[0]
    tokens = round(steps * real_tokens_per_step(first))
    size = min(first.rows_per_step, first.train.num_rows) * run.plan.dataset.row_length  # in whole rows
    said = f"{settings.minutes:g} minutes: {steps:,} steps of {size:,} tokens, {tokens:,} in all"
    tell(f"{said}; a step takes {duration(seconds) if seconds >= 1 else f'{seconds:.2f} s'}.")
    if (loss := expected_loss(run, tokens)) is not None:
        tell(f"Held-out loss: {expectation(loss)}.")
    return settings.model_copy(update=_lengths(run, steps))


def real_tokens_per_step(stage: RunStage) -> float:
    """Return how many tokens a step of `stage` reads on average, without padding."""
    return min(stage.rows_per_step, stage.train.num_rows) * stage.train.num_tokens / stage.train.num_rows


def _lengths(run: Run, steps: int) -> dict[str, int]:
    """Return the options that make the stages of `run` `steps` steps long, which may be a part of the strategy."""
    plan = run.plan
    whole = round(steps / sum(stage.spec.fraction for stage in plan.stages))
    rows = rows_per_step(run.settings.batch_tokens, plan.dataset.row_length)
    return {"max_steps": whole, "epochs": math.ceil(whole / steps_per_epoch(plan.dataset.train.num_rows, rows))}


def _begun(settings: TrainSettings) -> dict[str, Any] | None:
    """Return what was chosen for the run that is to resume; None if there is none.

    Raises:
        UserError: it was begun with other minutes or another size of a step, or its checkpoint can't be read.
    """
    if (before := settings_of_checkpoint(settings)) is None:
        return None
    if before.get("minutes", settings.minutes) != settings.minutes:
        raise UserError("--minutes", settings.minutes, as_there(settings, settings.output, before["minutes"]))
    if "minutes" not in before:  # an earlier version wrote it
        tell(f"--minutes {settings.minutes:g} changes nothing: the run that resumes keeps its number of steps.")
    chosen = {name: before[name] for name in ("max_steps", "epochs", "batch_tokens") if name in before}
    given = settings.batch_tokens
    if "batch_tokens" in settings.model_fields_set and given != chosen.get("batch_tokens", given):
        raise UserError("--batch-tokens", given, as_there(settings, settings.output, chosen["batch_tokens"]))
    return chosen


def step_seconds(run: Run) -> float:
    """Return the median time of a step of `run`, without the first ones."""
    seconds: list[float] = []
    while len(seconds) < WARM_UP + TIMED or sum(seconds[WARM_UP:]) < SECONDS:
        run.step %= run.total_steps
        started = time.perf_counter()
        take_step(run)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


@torch.no_grad()
def evaluation_seconds(run: Run) -> float:
    """Return the time of an evaluation of `run`, from that of its first batches.

    A part of a step's time would be too little: an evaluation compares all tokens, in float32.
    """
    split, seconds = run.dataset.validation, []
    run.model.eval()
    with evaluation_fits(run.device), onednn_products(run.device):
        table_VD = run.model.lift_table()
        for batch in itertools.islice(batches(split), TIMED):
            started = time.perf_counter()
            losses_of(run.model, table_VD, batch, run.device)
            seconds.append((time.perf_counter() - started) / len(batch.labels))
    run.model.train()
    return statistics.median(seconds) * split.num_rows


def _steps_within(run: Run, budget: float, seconds: float, evaluation: float) -> int:
    """Return how many steps of `seconds` fit into `budget` seconds, with all evaluations of `evaluation` seconds."""
    fractions = [stage.spec.fraction for stage in run.plan.stages]
    epochs = sum(part / stage.steps_per_epoch for part, stage in zip(fractions, run.plan.stages, strict=True))
    between = 1 / run.settings.evaluate_every + epochs / sum(fractions)
    return math.floor((budget - 2 * evaluation) / (seconds + evaluation * between))


def expectation(loss: float) -> str:
    """Return the clause that says which held-out loss to expect."""
    return f"on WikiText and Alpaca, such a run ended at about {loss:.2f} nats per token"


def expected_loss(run: Run, tokens: int) -> float | None:
    """Return the held-out loss of the measured model after `tokens` tokens; None if nothing like `run` was measured."""
    measured = TrainSettings(no_teacher=True, batch_tokens=BATCH_TOKENS)
    settings, default = (each.model_dump(exclude=MAY_DIFFER) | each.decided() for each in (run.settings, measured))
    alike = settings == default
    size_differs = abs(run.model.config.vocab_size / 32_000 - 1) > 0.1
    if not alike or size_differs or not REACHED[0][0] / 2 <= tokens <= REACHED[-1][0] * 1.5:
        return None
    # A straight line in the logarithm of the tokens between two neighbours, and beyond the last ones.
    later = min(max(1, sum(tokens > known for known, _ in REACHED)), len(REACHED) - 1)
    (x1, y1), (x2, y2) = REACHED[later - 1 : later + 1]
    return y1 + (y2 - y1) * math.log(tokens / x1) / math.log(x2 / x1)
