"""Times, tokens and expected losses of trials by hand, with clocks and runs that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from indraquantum.config import TrainSettings
from indraquantum.training.run import trial_run
from indraquantum.training.step import StepInput
from indraquantum.trials import budget, lr_range
from indraquantum.trials import dry_run as costly
from indraquantum.trials.budget import expected_loss, step_seconds, within_minutes
from indraquantum.trials.lr_range import climb, suggested_rate

MEASURED = {"no_teacher": True, "batch_tokens": 2048}


def measured(vocab_size: int = 32_000, **options) -> SimpleNamespace:
    """A run like the measured ones, but for `options`."""
    settings = TrainSettings(**MEASURED | options)
    return SimpleNamespace(settings=settings, model=SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size)))


def test_options_that_change_no_loss_leave_the_expected_one():
    """1.19M tokens were measured: 4.21 nats. A real command gives folders, minutes and more."""
    free = {"output": "x", "logs": "y", "data": "z", "minutes": 60, "threads": 2, "precision": "bfloat16"}
    assert expected_loss(measured(**free, evaluate_every=7), round(1.19e6)) == pytest.approx(4.21)


@pytest.mark.parametrize(
    ("vocab_size", "known"), [(4096, False), (28_000, False), (30_000, True), (35_000, True), (36_000, False)]
)
def test_a_loss_is_expected_of_vocabularies_of_about_the_measured_size(vocab_size, known):
    assert (expected_loss(measured(vocab_size), round(1.19e6)) is not None) == known


def test_the_loss_is_expected_after_the_real_tokens(monkeypatch, tmp_path, capsys):
    """Rows of 48 hold 30 real tokens each, so a step of 480 tokens reads 300."""
    asked = []
    monkeypatch.setattr(budget, "step_seconds", lambda run: 4.0)
    monkeypatch.setattr(budget, "evaluation_seconds", lambda run: 7.0)
    monkeypatch.setattr(budget, "expected_loss", lambda run, tokens: asked.append(tokens) or 3.456)
    train = SimpleNamespace(num_tokens=9000, num_rows=300)
    stage = SimpleNamespace(spec=SimpleNamespace(fraction=1.0), steps_per_epoch=30, rows_per_step=10, train=train)
    plan = SimpleNamespace(stages=[stage], dataset=SimpleNamespace(row_length=48, train=train))
    monkeypatch.setattr(budget, "trial_run", lambda settings, **_: SimpleNamespace(settings=settings, plan=plan))
    given = {"output": tmp_path / "run", "no_teacher": True, "batch_tokens": 480, "minutes": 5, "evaluate_every": 10}
    steps = within_minutes(TrainSettings(**given)).max_steps
    # 300 s without a few for the trial, and two evaluations; a step takes 4 s and 7 / 10 + 7 / 30 s of evaluations.
    assert 50 < steps <= (300 - 14) / (4 + 7 / 10 + 7 / 30)
    assert asked == [300 * steps]
    said = capsys.readouterr().out
    assert f"5 minutes: {steps} steps of 480 tokens, {300 * steps:,} in all" in said
    assert "Held-out loss: on WikiText and Alpaca, such a run ended at about 3.46 nats per token." in said


class Clock:
    """A clock that each step moves on; `taken` holds the numbers of the steps."""

    def __init__(self, monkeypatch, module, seconds: list[float]) -> None:
        self.now, self.left, self.taken = 0.0, list(seconds), []
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "take_step", self.take_step)

    def take_step(self, run) -> None:
        self.taken.append(run.step)
        run.step += 1
        self.now += self.left.pop(0)


@pytest.mark.parametrize(
    ("seconds", "median"),
    [
        ([10, 10, 1, 1, 1, 1], 1),  # until the timed ones take 4 seconds
        ([10, 10, 5, 1, 2], 2),  # until three are timed; the first two don't count
    ],
)
def test_a_step_takes_the_median_time_without_the_first_ones(monkeypatch, seconds, median):
    clock = Clock(monkeypatch, budget, seconds)
    assert step_seconds(SimpleNamespace(step=0, total_steps=4)) == median
    assert clock.taken == [0, 1, 2, 3, 0, 1][: len(seconds)]  # after its last step, the run begins again


def test_a_dry_run_takes_the_time_of_the_second_step_of_a_stage(monkeypatch):
    clock = Clock(monkeypatch, costly, [10, 3])
    assert costly._step_seconds(SimpleNamespace(step=0), SimpleNamespace(first=7)) == 3
    assert clock.taken == [7, 7]


def test_a_dry_run_counts_real_tokens_and_labels(world, tmp_path, monkeypatch):
    """In rows with padding. The last token of a document has no label."""
    given = TrainSettings(
        data=world.pickle, tokenizer=str(world.tokenizer), output=tmp_path / "run", logs=tmp_path / "logs", threads=1,
        d_model=14, layers=1, heads=2, mlp_width=22, batch_tokens=480, no_teacher=True,
    )  # fmt: skip
    run = trial_run(given, counts_text=False)
    monkeypatch.setattr(costly, "_step_seconds", lambda *_: 1.0)
    monkeypatch.setattr(costly, "evaluation_seconds", lambda _: 0.5)
    found, step = costly.measure(run), run.plan.step(0)
    split, ends = step.split, set(step.split.document_offsets[1:].tolist())
    pieces = [piece for row in step.rows for piece in split.pieces[slice(*split.row_pieces[row : row + 2])].tolist()]
    assert len(step.rows) == 10
    assert found.step_tokens == sum(length for _, length in pieces) < 480
    assert found.size.labelled == found.step_tokens - sum(start + length in ends for start, length in pieces)
    assert found.size.labelled < found.step_tokens
    assert found.bytes["lifted table and its gradients"] == 3 * 320 * 12 * 4  # float32


def climbed(monkeypatch, losses: list[float]) -> tuple[lr_range.RangeTest, list[StepInput]]:
    """A range test with these losses, and the steps that it took."""
    seen: list[StepInput] = []

    def step_of(number: int) -> StepInput:
        return StepInput(None, np.array([number, 10 + number]), 1, 0.5, kd_weight=0.01 * number, seed=40 + number)

    monkeypatch.setattr(lr_range, "_loss_of", lambda _, step: seen.append(step) or losses[len(seen) - 1])
    run = SimpleNamespace(plan=SimpleNamespace(at=lambda _: SimpleNamespace(step=step_of)))
    return climb(run, lr_range.rising_rates(1e-5, 1.0, len(losses))), seen


def test_each_step_of_a_range_test_has_its_own_rows_and_seed_and_the_first_weights(monkeypatch):
    found, seen = climbed(monkeypatch, [6.0, 5.9, 5.8])
    assert [step.rows.tolist() for step in seen] == [[0, 10], [1, 11], [2, 12]]
    assert [step.seed for step in seen] == [40, 41, 42]
    assert [step.learning_rate for step in seen] == found.rates
    assert [step.kd_weight for step in seen] == [0.0] * 3


def test_one_high_loss_does_not_end_a_range_test(monkeypatch):
    """9.5 is more than 1.5 times the first loss, but the mean of the losses stays below."""
    found, _ = climbed(monkeypatch, [6.0] * 10 + [9.5] + [5.9] * 10)
    assert len(found.losses) == 21
    found, _ = climbed(monkeypatch, [6.0] * 10 + [30.0] * 11)
    assert len(found.losses) == 11  # the first one brings the mean above 9


def test_the_suggestion_comes_before_the_lowest_loss():
    """The last fall, from 9 to 7, is the steepest one, but the loss has risen before."""
    rates = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert suggested_rate(rates, [6, 5.9, 5.4, 5.2, 5.1, 9, 7]) == 1e-4
