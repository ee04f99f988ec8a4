"""Strategies as they run: which rows, weights and rates each step has, stops in every stage, what ends on disk."""

from __future__ import annotations

import math
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import survival
from indraquantum import cli
from indraquantum.config import CaptureSettings, PrepareSettings, TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepare import prepare
from indraquantum.data.tokenizer_training import train_tokenizer
from indraquantum.errors import UserError
from indraquantum.metrics import read_metrics
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.teacher.capture import capture
from indraquantum.teacher.signals import open_signals
from indraquantum.training import loop
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.cooccurrence import cooccurrence_table
from indraquantum.training.engine import Engine
from indraquantum.training.optimizers import new_optimizer
from indraquantum.training.parallel import SingleProcess
from indraquantum.training.plan import plan_run
from indraquantum.training.resume import resume
from indraquantum.training.run import log_frequencies, trial_run
from indraquantum.training.signals import find_signals
from indraquantum.training.step import StepInput

# What each shipped strategy is: its stages with sources, and the weights of kd, phase and magnitude at first and last.
SHIPPED = {
    "v4-unified": [("unified", "all", (0.01, 0.1, 0.1), (0.05, 0.1, 0.1))],
    "v5": [("unified", "all", (0.9, 0.1, 0.1), (0.9, 0.1, 0.1))],
    "stage1": [("stage1", ["wikitext"], (0, 0, 0), (0, 0, 0))],
    "stage2-v2-aggressive": [
        ("stage1", ["wikitext"], (0, 0, 0), (0, 0, 0)), ("stage2-v2", ["alpaca"], (9, 1, 1), (9, 1, 1)),
    ],
    "stage2-v3-gentle": [
        ("stage1", ["wikitext"], (0, 0, 0), (0, 0, 0)), ("stage2-v3", ["alpaca"], (0.05, 0.1, 0.1), (0.05, 0.1, 0.1)),
    ],
}  # fmt: skip


def small(world, folder, **changes):
    return survival.small_run(world, folder, **{"dropout": 0.0, **changes})


def metrics(settings):
    return read_metrics(settings.logs / settings.output.name / "metrics.jsonl")


def sources_of(dataset, split, rows) -> set[str]:
    """The sources of the tokens of rows, as a batch has them."""
    found = split.batch(rows).sources
    return {dataset.source_names[number] for number in np.unique(found[found >= 0])}


def watch_steps(monkeypatch, look):
    """Let `look` see what each step is given, before it is done."""
    do = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine, step: (look(step), do(engine, step))[1])


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_strategy_runs_as_its_file_says(world, tmp_path, monkeypatch, capsys, name):
    settings, dataset, seen = small(world, tmp_path, strategy=name), open_dataset("--data", world.data), []
    watch_steps(monkeypatch, lambda step: seen.append(sources_of(dataset, step.split, step.rows)))
    loop.train(settings)
    said = capsys.readouterr()
    lines = metrics(settings)[1:]
    per_epoch = -(-dataset.train.num_rows // (settings.batch_tokens // 48))
    assert len(lines) == len(seen) == 2 * per_epoch  # as many steps as --epochs over all rows, for every strategy
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [stage for stage, *_ in SHIPPED[name]]
    for stage, sources, first, last in SHIPPED[name]:
        own = [number for number, line in enumerate(lines) if line["stage"] == stage]
        assert set.union(*(seen[number] for number in own)) == set(
            dataset.source_names if sources == "all" else sources
        )
        for number, weights in ((own[0], first), (own[-1], last)):
            given = [lines[number][f"{term}_weight"] for term in ("kd", "phase", "magnitude")]
            assert given == pytest.approx(weights)
        taught = any(first)
        assert all((lines[number]["kd"] is not None) == taught for number in own)
        held_out = lines[own[-1]]["held_out"]  # where the stage ends
        assert set(held_out) == {*dataset.source_names, "all"}
        if len(SHIPPED[name]) > 1:
            figures = ", ".join(f"{source} {value:.4f}" for source, value in held_out.items())
            assert f"end of stage {stage}: held-out cross-entropy (nats/token) {figures}" in said.out + said.err
        # each stage has its own warm-up and decay
        rates = [lines[number]["learning_rate"] for number in own]
        assert max(rates) == settings.learning_rate
        assert rates[-1] < 0.5 * settings.learning_rate


RATES = {"table": 50.0, "projector": 0.4, "projector biases": 0.4, "layers": 2.0, "others": 1.0}


@pytest.mark.parametrize("taught", [True, False])
def test_v4_is_a_plain_loop_to_the_bit(world, tmp_path, taught):
    """The documented weights and schedule by their formulas, over all rows in an order that seed and epoch decide."""
    start = {"bias_start": "zeros", "table_start": "normal", "table_rate": 50.0, "projector_rate": 0.4}
    settings = small(world, tmp_path, dropout=0.1, no_teacher=not taught, **start)
    found = load_checkpoint("", loop.train(settings).checkpoint).model
    dataset = open_dataset("--data", world.data)
    signals = open_signals("--signals", world.signals, dataset) if taught else None
    tokenizer, num_rows = dataset.tokenizer, dataset.train.num_rows
    config = IndraQuantumConfig.from_settings(
        settings, tokenizer.vocabulary_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    torch.manual_seed(settings.seed)
    model = IndraQuantumPhase2(config).train()
    optimizer = new_optimizer(model, settings)
    engine = Engine(SingleProcess(model), optimizer)
    rows_per_step, micro_batch_rows = settings.batch_tokens // 48, settings.micro_batch_tokens // 48
    per_epoch = -(-num_rows // rows_per_step)
    steps, warm = 2 * per_epoch, max(1, round(0.05 * 2 * per_epoch))
    for step in range(steps):
        progress = (step - warm) / (steps - warm)
        factor = (step + 1) / warm if step < warm else 0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * progress))
        weights = {"kd_weight": 0.01 + (0.05 - 0.01) * step / (steps - 1), "phase_weight": 0.1, "magnitude_weight": 0.1}
        epoch, place = divmod(step, per_epoch)
        order = np.argsort(np.random.Philox(key=[settings.seed, epoch]).random_raw(num_rows))
        rows = order[place * rows_per_step : (place + 1) * rows_per_step]
        engine.step(
            StepInput(
                dataset.train, rows, micro_batch_rows, settings.learning_rate * factor, table_rate=50.0,
                seed=settings.seed * 1_000_003 + step, signals=signals, **(weights if taught else {}),
            )
        )  # fmt: skip
        for group in optimizer.param_groups:
            assert group["lr"] == settings.learning_rate * factor * RATES[group["name"]]
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_stages_visit_every_token_of_their_sources_once_an_epoch(world, tmp_path):
    dataset = open_dataset("--data", world.data)
    plan = plan_run(small(world, tmp_path, strategy="stage2-v3-gentle", epochs=6), dataset)
    assert len(plan.stages) == 2
    places = []
    for stage in plan.stages:
        drawn = np.concatenate([stage.rows_of(stage.first + step) for step in range(stage.steps_per_epoch)])
        batch = stage.train.batch(drawn)
        assert sorted(drawn) == list(range(stage.train.num_rows))
        assert sources_of(dataset, stage.train, drawn) == set(stage.spec.sources)
        places.append(batch.index[batch.index >= 0])
        # each token is where the dataset has it, with the same label and place in its piece
        everywhere = dataset.train.batch(np.arange(dataset.train.num_rows))
        for part, whole in zip(batch[:3], everywhere[:3], strict=True):
            by_place = whole[everywhere.index >= 0]
            assert (part[batch.index >= 0] == by_place[places[-1]]).all()
        assert stage.train.num_rows < 1.1 * (stage.train.num_tokens / 48) + 1
    assert sorted(np.concatenate(places)) == list(range(dataset.train.num_tokens))
    assert plan.stages[0].end == plan.stages[1].first == plan.total_steps // 2


def test_a_run_starts_from_the_counts_of_what_it_trains_on(world, tmp_path):
    settings = small(world, tmp_path, strategy="stage1", no_teacher=True)
    plan = plan_run(settings, open_dataset("--data", world.data))
    train, size = plan.stages[0].train, plan.dataset.tokenizer.vocabulary_size
    labels = train.batch(np.arange(train.num_rows)).labels
    counts = np.bincount(labels[labels >= 0], minlength=size)
    assert np.array_equal(train.label_counts(size), counts)
    assert (plan.dataset.train.label_counts(size) > counts).any()
    np.testing.assert_allclose(log_frequencies(plan), np.log((counts + 1) / (counts + 1).sum()))
    # The stages share a stream of text: each part of it is counted once.
    stages = plan_run(small(world, tmp_path, strategy="stage2-v3-gentle"), plan.dataset).stages
    of_parts, of_whole, of_one = (
        cooccurrence_table(splits, size, 4, seed=1)
        for splits in ([stage.train for stage in stages], [plan.dataset.train], [train])
    )
    assert torch.equal(of_parts, of_whole)
    assert not torch.equal(of_one, of_whole)


def test_curves_and_rates_run_over_their_own_stage(world, tmp_path):
    kd = (
        "weights: {kd: {shape: linear, start: 0.2, end: 0.6}, phase: {shape: step, values: [0, 3], at_progress: [0.5]}}"
    )
    (tmp_path / "my.yaml").write_text(
        f"stages: [{{name: a, steps: 3, {kd}}}, {{name: b, steps: 5, {kd}, schedule: constant, warmup_fraction: 0.4}}]"
    )
    settings = TrainSettings(
        **small(world, tmp_path).model_dump(exclude_unset=True, exclude={"epochs"}), strategy=str(tmp_path / "my.yaml")
    )
    plan = find_signals(plan_run(settings, open_dataset("--data", world.data)))
    table = [plan.step(number) for number in range(plan.total_steps)]
    assert [plan.at(number).spec.name for number in range(8)] == ["a"] * 3 + ["b"] * 5
    assert [step.kd_weight for step in table] == pytest.approx([0.2, 0.4, 0.6, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert [step.phase_weight for step in table] == [0, 3, 3, 0, 0, 3, 3, 3]
    peak = settings.learning_rate
    assert [step.learning_rate for step in table[3:]] == pytest.approx([peak / 2, *[peak] * 4])
    assert str(table[3]) == "30 rows, learning rate 2.500e-03, weights kd 0.2, phase 0, magnitude 0"
    loop.train(settings)
    for line, step in zip(metrics(settings)[1:], table, strict=True):  # what is done is what the plan says
        assert [line[name] for name in ("kd_weight", "phase_weight", "learning_rate")] == [
            step.kd_weight, step.phase_weight, step.learning_rate,
        ]  # fmt: skip


@pytest.mark.parametrize("lengths", [("epochs: 2", "epochs: 3"), ("epochs: 2, steps: 7", "steps: 11"), (0.3, 0.7)])
def test_epochs_are_numbered_over_all_stages(world, tmp_path, lengths):
    first, second = (f"fraction: {length}" if isinstance(length, float) else length for length in lengths)
    (tmp_path / "my.yaml").write_text(
        f"stages: [{{name: a, {first}, sources: [wikitext]}}, {{name: b, {second}, sources: [alpaca]}}]"
    )
    plan = plan_run(
        TrainSettings(batch_tokens=192, strategy=str(tmp_path / "my.yaml")), open_dataset("--data", world.data)
    )
    a, b = plan.stages
    assert a.steps_per_epoch != b.steps_per_epoch
    ends = [*range(a.steps_per_epoch, a.steps, a.steps_per_epoch), a.steps]
    ends += [*range(a.steps + b.steps_per_epoch, plan.total_steps, b.steps_per_epoch), plan.total_steps]
    assert [step for step in range(1, plan.total_steps + 1) if plan.epoch_ends(step)] == ends
    assert [plan.epoch_of(step) for step in ends] == list(range(1, len(ends) + 1))
    # the names of checkpoints tell which is the newest
    assert [plan.step_of_epoch(epoch + 1) for epoch in range(len(ends))] == ends
    assert plan.epochs_done(plan.total_steps) == pytest.approx(
        a.steps / a.steps_per_epoch + b.steps / b.steps_per_epoch
    )


@pytest.fixture(scope="module")
def gentle(world, tmp_path_factory):
    """A two-stage run that nothing stopped, and what it ended with."""
    settings = survival.small_run(world, tmp_path_factory.mktemp("gentle"), strategy="stage2-v3-gentle", ema_decay=0.9)
    assert survival.in_fork(lambda: survival.train_small(settings)) == 0
    return survival.result(settings), len(metrics(settings)) - 1


@pytest.mark.parametrize(
    "place",
    ["first", "boundary", "second", *(pytest.param(name, marks=pytest.mark.slow) for name in ("early", "late"))],
)
def test_killed_in_any_stage_the_same_bits_follow(world, tmp_path, gentle, place):
    settings = survival.small_run(world, tmp_path, strategy="stage2-v3-gentle", ema_decay=0.9)
    expected, steps = gentle
    half = steps // 2
    step = {"early": 2, "first": half - 1, "boundary": half, "second": half + 1, "late": steps - 1}[place]

    def killed():
        survival.at(loop, "take_step", "after", step, survival.die)
        survival.train_small(settings)

    assert survival.in_fork(killed) == -signal.SIGKILL
    assert survival.in_fork(lambda: survival.train_small(settings)) == 0
    assert survival.result(settings) == expected


def test_a_resumed_run_keeps_the_rates_of_its_stages(world, tmp_path):
    strategy = tmp_path / "rates.yaml"
    strategy.write_text(
        "stages: [{name: a, fraction: 0.5, table_rate: 3.0, schedule: constant}, {name: b, fraction: 0.5}]"
    )
    whole, parts = (
        small(world, tmp_path / name, strategy=str(strategy), max_steps=4, save_every=1, keep_last=9, no_teacher=True)
        for name in ("whole", "parts")
    )
    for settings in (whole, parts):
        loop.train(settings)
    for step in (2, 3, 4):
        for path in parts.output.glob(f"*_{step}.pt"):
            path.unlink()
    for path in parts.output.glob("*_epoch_*.pt"):
        path.unlink()
    run = trial_run(parts)
    assert resume(run)
    assert run.step == 1
    assert [run.plan.step(step).table_rate for step in range(4)] == [3.0, 3.0, 10.0, 10.0]
    assert [run.plan.stages[number].settings.schedule for number in (0, 1)] == ["constant", "cosine"]
    loop.train(parts)
    assert survival.result(parts) == survival.result(whole)


def test_a_run_starts_from_the_weights_of_another(world, tmp_path, capsys):
    first = small(world, tmp_path / "first", strategy="stage1", max_steps=4)
    report = loop.train(first)
    capsys.readouterr()
    second = small(world, tmp_path / "second", strategy="stage2-v3-gentle", start_from=report.checkpoint, max_steps=4)
    plan = find_signals(plan_run(second, open_dataset("--data", world.data)))
    before = loop.start_run(second, plan, torch.device("cpu"))
    given = load_checkpoint("", report.checkpoint).model
    assert all(torch.equal(value, given[name]) for name, value in before.model.state_dict().items())
    loop.train(second)
    lines = metrics(second)
    assert lines[0]["held_out"] == pytest.approx(report.held_out)
    assert {line["stage"] for line in lines[1:]} == {"stage2-v3"}
    assert [line["step"] for line in lines] == list(range(3))  # stage 1's half is left out

    average = {"embedding.weight": given["embedding.weight"] + 1}  # used instead of the last weights, as everywhere
    checkpoint = load_checkpoint("", report.checkpoint)
    save_checkpoint(tmp_path / "average.pt", replace(checkpoint, average=average))
    third = small(world, tmp_path / "third", no_teacher=True, start_from=tmp_path / "average.pt", max_steps=1)
    started = loop.start_run(third, plan_run(third, open_dataset("--data", world.data)), torch.device("cpu"))
    expected = given | average
    assert all(torch.equal(value, expected[name]) for name, value in started.model.state_dict().items())

    (tmp_path / "my.yaml").write_text(
        f"start_from: first/run/{report.checkpoint.name}\nstages: [{{name: a, steps: 1}}]", encoding="utf-8"
    )
    plan = plan_run(TrainSettings(strategy=str(tmp_path / "my.yaml")), open_dataset("--data", world.data))
    assert plan.strategy.start_from.resolve() == report.checkpoint.resolve()  # relative to the file

    for options, said in (({"ends": "shared"}, "--ends shared, not separate"),
                          ({"state_width": 8}, f"--state-width 8, not {first.complex_width}")):  # fmt: skip
        other = small(world, tmp_path / "third", start_from=report.checkpoint, **options)
        with pytest.raises(UserError, match=rf"--start-from: got .*must be of a model with {said}"):
            loop.train(other)
    assert not (tmp_path / "third").exists()


def test_a_stage_may_have_data_and_signals_of_its_own(world, tmp_path, monkeypatch):
    """Shorter rows with signals of another temperature, while --data is what is held out."""
    own = tmp_path / "short"

    def shorter_rows(tokenizer):
        texts = {"wikitext": str(world.wikitext), "alpaca": str(world.alpaca)}
        prepare(PrepareSettings(**texts, tokenizer=str(tokenizer), max_length=40, output=own.with_suffix(".pkl")))

    shorter_rows(world.tokenizer)
    capture(CaptureSettings(data=own, teacher=str(world.teacher), output=tmp_path / "soft", temperature=2.0))
    kd = "weights: {kd: 1.0}"
    (tmp_path / "my.yaml").write_text(
        f"stages: [{{name: a, steps: 2, {kd}}}, {{name: b, epochs: 1, data: short, signals: soft, {kd}}}]"
    )
    changes = small(world, tmp_path).model_dump(exclude_unset=True, exclude={"epochs"})
    settings = TrainSettings(**changes, strategy=str(tmp_path / "my.yaml"))
    seen = []
    watch_steps(
        monkeypatch,
        lambda step: seen.append(
            (step.split.row_length, len(step.rows), step.signals.manifest.temperature, step.temperature)
        ),
    )
    loop.train(settings)
    rows = open_dataset("--data", own).train.num_rows
    per_step = settings.batch_tokens // 40
    steps = [min(per_step, rows - start) for start in range(0, rows, per_step)]
    assert seen == [(48, 30, 1.0, 1.0)] * 2 + [(40, count, 2.0, 2.0) for count in steps]
    assert set(metrics(settings)[-1]["held_out"]) == {"wikitext", "alpaca", "all"}

    train_tokenizer(world.wikitext, world.alpaca, 290, tmp_path / "tokenizer")
    shorter_rows(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"stage b: data: got .*short; must have the tokenizer of --data"):
        loop.train(settings.model_copy(update={"output": tmp_path / "other"}))
    assert not (tmp_path / "other").exists()


def test_signals_that_are_missing_are_captured_at_the_stages_temperature(world, tmp_path):
    shutil.copytree(world.data, tmp_path / "mixed")
    (tmp_path / "my.yaml").write_text("stages: [{name: a, steps: 1, weights: {kd: 1}, temperature: 2.0}]")
    changes = small(world, tmp_path, data=tmp_path / "mixed", teacher=str(world.teacher))
    settings = TrainSettings(
        **changes.model_dump(exclude_unset=True, exclude={"epochs"}), strategy=str(tmp_path / "my.yaml")
    )
    loop.train(settings)
    signals = open_signals("", tmp_path / "teacher_signals", open_dataset("--data", world.data))
    assert signals.manifest.temperature == 2.0
    assert metrics(settings)[-1]["kd"] > 0


def test_stages_on_the_same_data_may_have_signals_of_their_own(world, tmp_path, monkeypatch):
    shutil.copytree(world.data, tmp_path / "own")
    capture(CaptureSettings(data=world.data, teacher=str(world.teacher), output=tmp_path / "soft", temperature=2.0))
    shutil.copytree(world.signals, tmp_path / "hard")
    stage = "{name: %s, steps: 1, data: own, signals: %s, weights: {kd: 1.0}}"
    (tmp_path / "my.yaml").write_text(f"stages: [{stage % ('a', 'hard')}, {stage % ('b', 'soft')}]")
    common = small(world, tmp_path).model_dump(exclude_unset=True, exclude={"epochs"})
    seen = []
    watch_steps(monkeypatch, lambda step: seen.append((step.signals.manifest.temperature, step.temperature)))
    loop.train(TrainSettings(**common, strategy=str(tmp_path / "my.yaml")))
    assert seen == [(1.0, 1.0), (2.0, 2.0)]


def test_datasets_that_would_share_a_folder_of_signals_are_refused_before_the_teacher_is_asked(world, tmp_path):
    shutil.copytree(world.data, tmp_path / "mixed")
    texts = {"wikitext": str(world.wikitext), "alpaca": str(world.alpaca)}
    options = {"tokenizer": str(world.tokenizer), "max_length": 40, "output": tmp_path / "short.pkl"}
    prepare(PrepareSettings(**texts, **options))
    kd = "weights: {kd: 1.0}"
    (tmp_path / "my.yaml").write_text(
        f"stages: [{{name: a, steps: 2, {kd}}}, {{name: b, steps: 2, data: short, {kd}}}]"
    )
    common = small(world, tmp_path, data=tmp_path / "mixed", teacher=str(world.teacher))
    settings = TrainSettings(
        **common.model_dump(exclude_unset=True, exclude={"epochs"}), strategy=str(tmp_path / "my.yaml")
    )
    with pytest.raises(UserError, match=r"stage b: signals: got \S+; must be another folder than that of stage a"):
        loop.train(settings)
    assert not (tmp_path / "teacher_signals").exists()


@pytest.mark.parametrize("second", ["", ", temperature: 3.0"])
def test_stages_on_the_same_data_share_one_temperature(world, tmp_path, second):
    """The one that any of them states; two are refused before the teacher is asked."""
    shutil.copytree(world.data, tmp_path / "mixed")
    stage = "{name: %s, steps: 1, weights: {kd: 1}%s}"
    stages = (stage % ("a", ""), stage % ("b", ", temperature: 2.0"), stage % ("c", second))
    (tmp_path / "my.yaml").write_text(f"stages: [{', '.join(stages)}]")
    common = small(world, tmp_path, data=tmp_path / "mixed", teacher=str(world.teacher))
    settings = TrainSettings(
        **common.model_dump(exclude_unset=True, exclude={"epochs"}), strategy=str(tmp_path / "my.yaml")
    )
    if second:
        with pytest.raises(UserError, match=r"stage c: temperature: got 3\.0; must be 2\.0, as in stage b"):
            loop.train(settings)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "my.yaml"]
    else:
        loop.train(settings)
        signals = open_signals("", tmp_path / "teacher_signals", open_dataset("--data", world.data))
        assert signals.manifest.temperature == 2.0


def test_the_order_of_stages_is_part_of_a_run(world, tmp_path):
    stages = ["{name: a, steps: 2}", "{name: b, steps: 2}"]
    common = small(world, tmp_path).model_dump(exclude_unset=True, exclude={"epochs"})

    def run(order, **changes):
        (tmp_path / "my.yaml").write_text(f"stages: [{', '.join(order)}]")
        return loop.train(TrainSettings(**common | changes, strategy=str(tmp_path / "my.yaml")))

    report = run(stages)
    with pytest.raises(UserError, match="--strategy: got stages b, a; must be a, b, as in the run"):
        run(stages[::-1])
    assert run(stages).steps == report.steps == 4


OWN = "stages: [{name: a, fraction: 1.0, %s}]"
REFUSED = {
    "unknown source": (OWN % "sources: [novels]", r"stage a: sources: got novels; must be one of .*wikitext"),
    "another temperature": (
        OWN % "weights: {kd: 1}, temperature: 2.0", r"stage a: temperature: got 2\.0; must be 1\.0, as in the signals",
    ),
    "too short": ("stages: [{name: a, fraction: 0.01}, {name: b, fraction: 0.99}]", r"--epochs: got 2; is too short"),
    "no dataset": (
        OWN % "data: nowhere", r"stage a: data: got .*nowhere; does not exist",
    ),
    "no checkpoint": (
        "start_from: nowhere.pt\nstages: [{name: a, fraction: 1.0}]", r"--start-from: got .*nowhere.pt; must be a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(world, tmp_path, case, capsys):
    text, match = REFUSED[case]
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    arguments = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in small(world, tmp_path).model_dump(exclude_unset=True).items()
    ]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *arguments, f"--strategy={tmp_path / 'my.yaml'}"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert re.search(match, said), said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_signals_are_asked_for_only_where_a_stage_needs_them(world, tmp_path):
    missing = {"signals": tmp_path / "nowhere"}
    loop.train(small(world, tmp_path, strategy="stage1", max_steps=2, **missing))
    with pytest.raises(UserError, match=r"--signals: got .*nowhere"):
        loop.train(small(world, tmp_path / "other", strategy="stage2-v3-gentle", max_steps=2, **missing))
    assert not (tmp_path / "other").exists()


def test_a_dry_run_tells_the_stages(world, tmp_path, capsys):
    arguments = [f"--data={world.data}", f"--output={tmp_path / 'run'}", "--strategy=stage2-v3-gentle", "--dry-run"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *arguments])
    assert exit_.value.code == 0
    settings = small(world, tmp_path, strategy="stage2-v3-gentle", batch_tokens=4096, epochs=3)
    stages = plan_run(settings, open_dataset("--data", world.data)).stages
    rows = [stage.train.num_rows for stage in stages]
    said = capsys.readouterr().out
    assert f"stage stage1: steps 1 to {stages[0].steps}, " in said
    assert f" of {rows[0]} rows (wikitext); weights kd 0, phase 0, magnitude 0\n" in said
    assert f"of {rows[1]} rows (alpaca); weights kd 0.05, phase 0.1, magnitude 0.1\n" in said
    assert not (tmp_path / "run").exists()
