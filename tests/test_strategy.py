"""Strategies: curves by hand, every shipped file, and what is refused before anything is written."""

from __future__ import annotations

import math

import pytest

from indraquantum.config import TrainSettings
from indraquantum.errors import UserError
from indraquantum.strategy import RATES, Constant, Cosine, Linear, Stage, Steps, load_strategy, resolve, shipped_names


def write(folder, text: str):
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_curves_by_hand():
    steps = range(5)
    assert [Linear(start=0.01, end=0.05).at(step, 5) for step in steps] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    half = 0.5 * (1 - math.cos(math.pi / 4))
    assert [Cosine(start=2, end=6).at(step, 5) for step in steps] == pytest.approx(
        [2, 2 + 4 * half, 4, 6 - 4 * half, 6]
    )
    assert [Constant(value=0.3).at(step, 5) for step in steps] == [0.3] * 5
    jumps = Steps(values=(1, 2, 3), at_progress=(0.25, 0.6))
    assert [jumps.at(step, 5) for step in steps] == [1, 2, 2, 3, 3]
    assert [curve.at(0, 1) for curve in (Linear(start=7, end=9), Cosine(start=7, end=9), jumps)] == [7, 7, 1]
    assert [curve.highest for curve in (Linear(start=7, end=2), Cosine(start=1, end=9), jumps)] == [7, 9, 3]


@pytest.mark.parametrize("written", ["2e-3", "2.e-3", "2E-3", ".2e-2", "+0.2e-02", "0.002"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, written):
    stages = f"stages: [{{name: a, fraction: 1.0, learning_rate: {written}, weights: {{kd: {written}}}}}]"
    (stage,) = load_strategy(write(tmp_path, stages)).stages
    assert (stage.learning_rate, stage.weights.kd) == (0.002, Constant(value=0.002))


@pytest.mark.parametrize("name", ["e3", "1e", "2e-3a", "e-3", "'2e-3'"])
def test_other_words_stay_words(tmp_path, name):
    (stage,) = load_strategy(write(tmp_path, f"stages: [{{name: {name}, fraction: 1.0}}]")).stages
    assert stage.name == name.strip("'")


def test_a_number_is_a_constant_and_what_is_left_out_is_zero():
    stage = Stage(name="a", fraction=1.0, weights={"kd": 0.5, "phase": {"shape": "linear", "start": 0, "end": 1}})
    assert stage.weights.kd == Constant(value=0.5)
    assert stage.weights.phase == Linear(start=0, end=1)
    assert stage.weights.magnitude == Constant(value=0)
    assert stage.asks_the_teacher
    assert not Stage(name="a", fraction=1.0).asks_the_teacher


def test_v4_is_the_default_and_agrees_with_the_options():
    settings = TrainSettings()
    (stage,) = resolve(settings).stages
    assert settings.strategy == "v4-unified"
    assert stage.weights.kd == Linear(start=settings.kd_weight_start, end=settings.kd_weight_end)
    assert stage.weights.phase == Constant(value=settings.phase_weight)
    assert stage.weights.magnitude == Constant(value=settings.magnitude_weight)
    assert [getattr(stage, name) for name in RATES] == [getattr(settings, name) for name in RATES]
    assert (stage.sources, stage.temperature) == ("all", None)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_strategy_says_what_it_was(name):
    strategy = load_strategy(name)
    assert strategy.about
    assert len(strategy.stages) == (1 if name in ("v4-unified", "v5", "stage1") else 2)


def test_v5_is_v4_with_the_weight_that_helps():
    (v4,), (v5,) = (resolve(TrainSettings(strategy=name)).stages for name in ("v4-unified", "v5"))
    assert v5.weights.kd == Constant(value=0.9)
    assert v5.model_copy(update={"weights": v4.weights}) == v4
    (given,) = resolve(TrainSettings(strategy="v5", kd_weight_start=4.0, kd_weight_end=4.0)).stages
    assert (given.weights.kd.at(0, 9), given.weights.kd.at(8, 9)) == (4.0, 4.0)


def test_options_that_are_given_stand_in_place_of_the_strategys(tmp_path):
    (stage,) = resolve(TrainSettings(kd_weight_end=0.4, phase_weight=0.0, learning_rate=1e-3, schedule="wsd")).stages
    assert stage.weights.kd == Linear(start=0.01, end=0.4)
    assert stage.weights.phase == Constant(value=0.0)
    assert stage.weights.magnitude == Constant(value=0.1)
    assert (stage.learning_rate, stage.schedule) == (1e-3, "wsd")
    own = write(tmp_path, "stages: [{name: a, fraction: 1.0, learning_rate: 0.5, warmup_fraction: 0.5}]")
    (stage,) = resolve(TrainSettings(strategy=own, warmup_fraction=0.1)).stages
    assert (stage.learning_rate, stage.warmup_fraction) == (0.5, 0.1)
    both = resolve(TrainSettings(strategy="stage2-v3-gentle", learning_rate=1e-3)).stages
    assert [stage.learning_rate for stage in both] == [1e-3, 1e-3]


def test_no_teacher_leaves_nothing_to_ask():
    assert resolve(TrainSettings(strategy="stage2-v2-aggressive")).asks_the_teacher
    assert not resolve(TrainSettings(strategy="stage2-v2-aggressive", no_teacher=True)).asks_the_teacher


ONE = "name: a, fraction: 1.0"
REFUSED = {
    "no file": (None, {}, r"--strategy: got nowhere; must be .*v4-unified, v5, or a YAML file"),
    "not YAML": ("stages: [", {}, "must be YAML"),
    "a list": ("- a", {}, "must hold stages"),
    "twice": ("stages: []\nstages: []", {}, "'stages' is given twice"),
    "no stage": ("stages: []", {}, "stages: got .*at least 1"),
    "unknown field": (f"stages: [{{{ONE}, lenght: 3}}]", {}, r"my.yaml: stages\.0\.lenght: got 3; there is no such"),
    "unknown weight": (f"stages: [{{{ONE}, weights: {{ce: 1}}}}]", {}, r"stages\.0\.weights\.ce: got 1"),
    "below 0": (f"stages: [{{{ONE}, weights: {{kd: -1}}}}]", {}, r"kd\.constant\.value: got -1; .*greater than"),
    "text": (f"stages: [{{{ONE}, weights: {{kd: much}}}}]", {}, r"weights\.kd: got much"),
    "a word that YAML takes for true": (f"stages: [{{{ONE}, weights: {{kd: on}}}}]", {}, r"weights\.kd.*: got True"),
    "unknown shape": (f"stages: [{{{ONE}, weights: {{kd: {{shape: cubic}}}}}}]", {}, "cubic"),
    "no end": (f"stages: [{{{ONE}, weights: {{kd: {{shape: linear, start: 1}}}}}}]", {}, r"kd\.linear\.end"),
    "too few values": (
        f"stages: [{{{ONE}, weights: {{kd: {{shape: step, values: [1, 2], at_progress: [0.2, 0.4]}}}}}}]", {},
        r"kd\.at_progress: got 0\.2, 0\.4; must have one number fewer than values, which has 2",
    ),
    "falling": (
        f"stages: [{{{ONE}, weights: {{kd: {{shape: step, values: [1, 2, 3], at_progress: [0.4, 0.2]}}}}}}]", {},
        r"kd\.at_progress: got 0\.4, 0\.2; must rise",
    ),
    "no length": ("stages: [{name: a}]", {}, r"stages\.0\.fraction: got nothing; must be given, or epochs, or steps"),
    "two lengths": (f"stages: [{{{ONE}, steps: 3}}]", {}, r"stages\.0\.steps: got 3; must be left out"),
    "mixed lengths": (f"stages: [{{{ONE}}}, {{name: b, epochs: 3}}]", {}, r"1\.epochs: got 3; must be left out"),
    "not whole": ("stages: [{name: a, fraction: 0.5}, {name: b, fraction: 0.4}]", {}, r"got 0\.5, 0\.4; must sum to 1"),
    "same name": ("stages: [{name: a, steps: 1}, {name: a, steps: 1}]", {}, r"stages\.1\.name: got a; must differ"),
    "same source": (f"stages: [{{{ONE}, sources: [x, x]}}]", {}, r"sources: got x, x; must all be different"),
    "one source": (f"stages: [{{{ONE}, sources: x}}]", {}, r"sources: got x; must be all, or a list of sources: \[x\]"),
    "a number in quotes": (f"stages: [{{{ONE}, weights: {{kd: '1'}}}}]", {}, r"kd: got 1; must be a number"),
    "no shape": (f"stages: [{{{ONE}, weights: {{kd: {{value: 1}}}}}}]", {}, r"kd: got .*; must be a number"),
    "signals alone": (f"stages: [{{{ONE}, signals: x}}]", {}, r"signals: got x; must be left out without data"),
    "epochs of its own": ("stages: [{name: a, epochs: 2}]", {"epochs": 3}, "--epochs: got 3; must be left out"),
    "steps of its own": ("stages: [{name: a, steps: 2}]", {"max_steps": 3}, "--max-steps: got 3; must be left out"),
    "nothing left": (f"stages: [{{{ONE}, only_from_scratch: true}}]", {"start_from": "x.pt"}, "--start-from: .*stage"),
    "rates differ": (
        "stages: [{name: a, steps: 1, learning_rate: 0.1}, {name: b, steps: 1}]", {"learning_rate": 0.2},
        r"--learning-rate: got 0\.2; must be left out .* differ",
    ),
    "no room to decay": (
        f"stages: [{{{ONE}, schedule: wsd, warmup_fraction: 0.5}}]", {"decay_fraction": 0.6},
        r"--decay-fraction: got 0\.6; must be at most 1 with the warm-up fraction 0\.5 of stage a",
    ),
    "a bent curve": (
        f"stages: [{{{ONE}, weights: {{kd: {{shape: cosine, start: 0, end: 1}}}}}}]", {"kd_weight_end": 0.3},
        r"--kd-weight-end: got 0\.3; must be left out .* not a straight line",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_is_refused_by_name(tmp_path, case):
    text, options, match = REFUSED[case]
    strategy = "nowhere" if text is None else write(tmp_path, text)
    with pytest.raises(UserError, match=match) as error:
        resolve(TrainSettings(strategy=strategy, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["kd_weight_start", "kd_weight_end", "phase_weight", "magnitude_weight"])
def test_weights_that_stages_differ_in_are_not_overridden(option):
    with pytest.raises(UserError, match=r"must be left out with --strategy stage2-v2-aggressive, whose stages differ"):
        resolve(TrainSettings(strategy="stage2-v2-aggressive", **{option: 0.2}))
    with pytest.raises(UserError, match=r"got 0.2; must be left out with --no-teacher"):
        resolve(TrainSettings(no_teacher=True, **{option: 0.2}))
