"""Resuming after something has changed: a way back by hand, signals that grew or moved, a start that is gone."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

import survival
from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.metrics import read_metrics
from indraquantum.teacher import capture as capture_module
from indraquantum.teacher import loading
from indraquantum.teacher.capture import capture
from indraquantum.teacher.manifest import read_manifest, write_manifest
from indraquantum.training import loop, resume
from indraquantum.training import signals as training_signals
from indraquantum.training.checkpoint import (
    BEST_NAME,
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_checkpoint_path,
)

EVERY_STEP = {"save_every": 1, "keep_last": 9, "epochs": 1}
SHARD = 480  # ten rows of 48


def interrupted(settings, step: int) -> None:
    """Train until SIGTERM comes after `step` steps."""
    take_step = loop.take_step

    def struck(run):
        metrics = take_step(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", struck)
        with pytest.raises(SystemExit) as left:
            loop.train(settings)
    assert left.value.code == 128 + signal.SIGTERM


def changed(settings, **changes):
    return settings.model_copy(update=changes)


def test_after_going_back_the_message_names_the_command_that_resumes(world, tmp_path, capsys):
    settings = survival.small_run(world, tmp_path, **EVERY_STEP)
    interrupted(settings, 3)
    assert "Stopped at step 3 by SIGTERM. To resume, run the same command.\n" in capsys.readouterr().err
    loop.train(settings)
    whole = survival.result(settings)
    back = changed(settings, resume=str(step_checkpoint_path(settings.output, 2)))
    interrupted(back, 4)
    said = "Stopped at step 4 by SIGTERM. To resume, run the same command with --resume auto.\n"
    assert said in capsys.readouterr().err
    first = (settings.output / "checkpoint_v4_step_3.pt.set-aside-1").read_bytes()
    interrupted(back, 4)  # who types the same command nevertheless loses nothing
    assert (settings.output / "checkpoint_v4_step_3.pt.set-aside-1").read_bytes() == first
    assert (settings.output / "checkpoint_v4_step_3.pt.set-aside-2").exists()
    capsys.readouterr()
    loop.train(changed(settings, resume="auto"))
    assert "Resuming from step 4 of 6." in capsys.readouterr().out
    assert survival.result(settings) == whole


def test_a_checkpoint_of_another_folder_does_not_resume_into_a_folder_with_another_run(world, tmp_path):
    ours, other = (
        survival.small_run(world, tmp_path / name, **EVERY_STEP, seed=seed) for name, seed in (("a", 3), ("b", 4))
    )
    loop.train(ours)
    loop.train(other)
    before = survival.content_of(other.output, other.logs)
    step_2 = step_checkpoint_path(ours.output, 2)
    there = changed(ours, output=other.output, logs=other.logs, resume=str(step_2))
    must = f"must be empty, or hold the run of --resume {step_2}; it holds one with --seed 4"
    said = f"--output: got {other.output}; {must}"
    with pytest.raises(UserError) as refused:
        loop.train(there)
    assert str(refused.value) == said
    after = survival.content_of(other.output, other.logs)
    assert {name: after[name] for name in before} == before
    longer = changed(ours, output=tmp_path / "longer", logs=tmp_path / "longer_logs", epochs=2)
    loop.train(longer)
    with pytest.raises(UserError, match=r"--output: got \S+longer; must be empty, .*; it holds one of another length$"):
        loop.train(changed(ours, output=longer.output, logs=longer.logs, resume=str(step_2)))
    # Without its checkpoints, the metrics of the other run are still its own.
    for path in other.output.iterdir():
        path.unlink()
    loop.train(there)
    (weights, lines), (expected, whole) = survival.result(there), survival.result(ours)
    assert weights == expected
    assert lines == whole[-len(lines) :]
    assert len(lines) == 4
    aside = other.logs / other.output.name / "metrics.jsonl.set-aside-1"
    assert aside.read_bytes() == before[other.logs / other.output.name / "metrics.jsonl"]


def test_metrics_of_another_run_are_told_by_its_settings(world, tmp_path):
    """Before its first evaluation, the figures of both runs are equal, because only the rates differ."""
    ours, other = (
        survival.small_run(world, tmp_path / name, **EVERY_STEP | {"evaluate_every": 5}, learning_rate=rate)
        for name, rate in (("a", 1e-3), ("b", 2e-3))
    )
    loop.train(ours)
    loop.train(other)
    metrics = other.logs / other.output.name / "metrics.jsonl"
    before = metrics.read_bytes()
    for path in other.output.iterdir():
        path.unlink()
    there = changed(ours, output=other.output, logs=other.logs, resume=str(step_checkpoint_path(ours.output, 3)))
    interrupted(there, 5)
    assert metrics.with_name("metrics.jsonl.set-aside-1").read_bytes() == before
    loop.train(there)  # the same command again: the metrics are its own now
    assert not metrics.with_name("metrics.jsonl.set-aside-2").exists()
    assert [line["step"] for line in read_metrics(metrics)] == [4, 5, 6]


def test_a_copy_of_a_checkpoint_brings_a_damaged_run_back(world, tmp_path):
    settings = survival.small_run(world, tmp_path, **EVERY_STEP)
    loop.train(settings)
    whole = survival.result(settings)
    copy = tmp_path / "copy.pt"
    step_2 = step_checkpoint_path(settings.output, 2)
    shutil.copy(step_2, copy)
    for path in settings.output.glob("*.pt"):
        path.write_bytes(b"damaged")
    interrupted(changed(settings, resume=str(copy)), 3)
    assert load_checkpoint("--resume", step_2).step == 2
    loop.train(settings)
    assert survival.result(settings) == whole


def bare(step: int) -> Checkpoint:
    """A checkpoint without a model."""
    return Checkpoint(
        model_config={}, model={}, average={}, optimizer={}, step=step, tokens=0, finished=False, pending=None,
        guard={}, best={}, loss_scale={}, settings={}, tokenizer={},
    )  # fmt: skip


@pytest.mark.parametrize(("best", "stays"), [(2, True), (4, True), (5, False), ("damaged", False)])
def test_going_back_keeps_an_earlier_best_checkpoint(tmp_path, best, stays):
    """From step 5 to 4. A damaged one may be of any step."""
    path = tmp_path / BEST_NAME
    save_checkpoint(path, bare(2 if best == "damaged" else best))
    if best == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    for step in (4, 5):
        save_checkpoint(step_checkpoint_path(tmp_path, step), bare(step))
    used = step_checkpoint_path(tmp_path, 4)
    plan = SimpleNamespace(step_of_epoch=lambda epoch: 3 * epoch)
    run = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(resume=str(used)), step=4, plan=plan)
    resume._go_back(run, used, load_checkpoint("", used))
    aside = [f"{step_checkpoint_path(tmp_path, 5).name}.set-aside-1", *([] if stays else [f"{BEST_NAME}.set-aside-1"])]
    assert {path.name for path in tmp_path.glob("*.pt.set-aside-*")} == set(aside)
    assert path.exists() == stays


def test_going_back_sets_a_later_best_checkpoint_aside(world, tmp_path):
    settings = survival.small_run(world, tmp_path, **EVERY_STEP, keep_best=True, evaluate_every=1)
    loop.train(settings)
    best, aside = settings.output / BEST_NAME, settings.output / f"{BEST_NAME}.set-aside-1"
    late = load_checkpoint("", best).step
    assert late > 3
    interrupted(changed(settings, resume=str(step_checkpoint_path(settings.output, 2))), 3)
    assert load_checkpoint("", aside).step == late
    assert not best.exists() or load_checkpoint("", best).step == 3
    assert (settings.output / f"{best.stem}.json.set-aside-1").exists()


def test_after_going_back_to_the_best_a_kill_costs_no_step(world, tmp_path):
    settings = survival.small_run(world, tmp_path, **EVERY_STEP)
    loop.train(settings)
    whole, best = survival.result(settings), settings.output / BEST_NAME
    save_checkpoint(best, load_checkpoint("", step_checkpoint_path(settings.output, 2)))
    for step in (1, 2):  # the best one is older than all others
        step_checkpoint_path(settings.output, step).unlink()

    def killed():
        survival.at(loop, "take_step", "before", 1, survival.die)
        loop.train(changed(settings, resume=str(best)))

    assert survival.in_fork(killed) == -signal.SIGKILL
    assert newest_checkpoint(settings.output, lambda epoch: epoch * 10**6).checkpoint.step == 2
    loop.train(settings)
    assert survival.result(settings) == whole


def stopped_in_the_training_rows(action) -> None:
    """Interrupt the capture of `action` when it has a shard of training rows."""
    write = capture_module.write_manifest

    def stopping(folder, manifest):
        write(folder, manifest)
        if any(entry.split == "train" for entry in manifest.shards):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "write_manifest", stopping)
        with pytest.raises(KeyboardInterrupt):
            action()


@pytest.fixture
def to_capture(world, tmp_path, monkeypatch):
    """A run whose signals are not captured yet; they will be in shards of ten rows."""
    in_shards = lambda options, dataset, **by: capture(options, dataset, SHARD, **by)  # noqa: E731
    monkeypatch.setattr(training_signals, "capture", in_shards)
    data = shutil.copytree(world.data, tmp_path / "mixed")
    return survival.small_run(world, tmp_path, data=data, teacher=str(world.teacher), max_steps=1)


def of_capture(settings, world) -> CaptureSettings:
    """The options of `indra capture` for the signals beside the data of `settings`."""
    output = settings.data.parent / "teacher_signals"
    return CaptureSettings(data=settings.data, teacher=str(world.teacher), output=output, device="cpu", threads=1)


def test_training_completes_a_capture_that_it_began(to_capture, tmp_path, capsys):
    folder = tmp_path / "teacher_signals"
    stopped_in_the_training_rows(lambda: loop.train(to_capture))
    assert not read_manifest("", folder).complete
    # Whoever names the folder trains on the part.
    loop.train(changed(to_capture, signals=folder, output=tmp_path / "part"))
    with pytest.raises(UserError, match=r"^--teacher: got .*; to train on what is there, give \S+signals with --sig"):
        loop.train(changed(to_capture, teacher=str(tmp_path / "nothing")))
    assert not read_manifest("", folder).complete
    capsys.readouterr()
    loop.train(to_capture)
    assert read_manifest("", folder).complete
    said = capsys.readouterr().out
    assert f"Unfinished teacher signals at {folder}: capturing from" in said
    assert "100.0 % of the training rows covered" in said
    assert not list(folder.glob(".*"))


def test_training_leaves_an_unfinished_capture_of_yours_as_it_is(world, to_capture):
    options = of_capture(to_capture, world)
    stopped_in_the_training_rows(lambda: capture(options, None, SHARD))
    before = {path.name for path in options.output.iterdir()}
    loop.train(to_capture)
    assert not read_manifest("", options.output).complete
    assert {path.name for path in options.output.iterdir()} == before


@pytest.mark.parametrize("where", ["choose_batch_rows", "run_jobs"])  # without a manifest yet, and with one
def test_a_second_run_leaves_a_capture_that_is_starting_alone(to_capture, tmp_path, monkeypatch, where):
    original, second = getattr(capture_module, where), changed(to_capture, output=tmp_path / "second")

    def meanwhile(*arguments):
        with pytest.raises(UserError, match=r"^--signals: got \S+; is in use by another run, .* give another folder$"):
            loop.train(second)
        return original(*arguments)

    monkeypatch.setattr(capture_module, where, meanwhile)
    assert loop.train(to_capture).steps == 1
    folder = tmp_path / "teacher_signals"
    assert read_manifest("", folder).complete
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("where", ["write_manifest", "run_jobs"])  # without a manifest yet, and with one
def test_a_capture_that_you_begin_after_a_training_that_was_killed_is_yours(world, to_capture, where):
    def killed():
        survival.at(capture_module, where, "before", 1, survival.die)
        loop.train(to_capture)

    assert survival.in_fork(killed) == -signal.SIGKILL
    options = of_capture(to_capture, world)
    assert (options.output / capture_module.MARK).exists()
    stopped_in_the_training_rows(lambda: capture(options, None, SHARD))
    loop.train(to_capture)
    assert not read_manifest("", options.output).complete


def test_a_capture_that_cannot_begin_leaves_no_folder(to_capture, tmp_path):
    with pytest.raises(UserError, match=r"--teacher.*or --no-teacher$"):
        loop.train(changed(to_capture, teacher=str(tmp_path / "nothing")))
    assert not (tmp_path / "teacher_signals").exists()


def test_a_capture_that_is_stopped_while_the_teacher_loads_leaves_nothing(to_capture, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_teacher", stopped)
    folder = tmp_path / "teacher_signals"
    with pytest.raises(KeyboardInterrupt):
        loop.train(to_capture)
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        loop.train(to_capture)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_run_on_a_part_of_a_capture_keeps_to_it_when_more_is_captured(world, to_capture, tmp_path, capsys):
    options = of_capture(to_capture, world)
    stopped_in_the_training_rows(lambda: capture(options, None, SHARD))
    whole, parts, older = (
        changed(to_capture, output=tmp_path / name / "run", logs=tmp_path / name / "logs", max_steps=None)
        for name in ("whole", "parts", "older")
    )
    loop.train(whole)
    for settings in (parts, older):
        interrupted(settings, 3)
    capture(options, None, SHARD)
    assert read_manifest("", options.output).complete
    loop.train(parts)
    assert "This run began with a part of the signals, and keeps it: " in capsys.readouterr().out
    assert survival.result(parts) == survival.result(whole)
    # A checkpoint of an earlier version does not list the shards.
    path = step_checkpoint_path(older.output, 3)
    save_checkpoint(path, replace(load_checkpoint("", path), signal_shards={}))
    with pytest.raises(UserError, match=r"^--signals: got \S+signals; must hold exactly the signals that the run that"):
        loop.train(older)


def test_signals_that_were_moved_are_not_captured_again_for_a_run_that_has_begun(world, tmp_path, monkeypatch):
    data = shutil.copytree(world.data, tmp_path / "mixed")
    signals = shutil.copytree(world.signals, tmp_path / "teacher_signals")
    settings = survival.small_run(world, tmp_path, data=data, teacher=str(world.teacher), max_steps=2)
    untaught = changed(settings, output=tmp_path / "untaught", no_teacher=True)
    for begun in (settings, untaught):
        loop.train(begun)
    moved = signals.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(training_signals, "capture", None)
    with pytest.raises(UserError, match=r"^--signals: got \S+signals; must hold the signals that the run that \S+run"):
        loop.train(settings)
    with pytest.raises(UserError, match=r"^--no-teacher: got False; must be True, as in the run that \S+untaught"):
        loop.train(changed(untaught, no_teacher=False))
    assert loop.train(changed(settings, signals=moved)).steps == 2


def stage_file(folder, stage: str):
    """A file of a strategy with one stage; its path."""
    path = folder / "my.yaml"
    path.write_text(f"stages: [{{name: one, steps: 1, {stage}}}]")
    return str(path)


def test_a_run_that_began_without_signals_resumes_without(world, tmp_path, monkeypatch):
    data = shutil.copytree(world.data, tmp_path / "mixed")
    options = {"data": data, "teacher": str(world.teacher), "max_steps": 1, "strategy": "stage1"}
    untaught = survival.small_run(world, tmp_path, **options)
    taught = changed(untaught, strategy="v4-unified")
    loop.train(untaught)
    monkeypatch.setattr(training_signals, "capture", None)
    needs = r"^--strategy: got v4-unified; needs signals in stage unified, but the run that \S+run holds began without"
    with pytest.raises(UserError, match=rf"{needs} them, in the stages stage1; give the strategy"):
        loop.train(taught)
    shutil.copytree(world.signals, tmp_path / "teacher_signals")
    with pytest.raises(UserError, match=r"^--strategy: got stages unified; must be stage1, as in the run that"):
        loop.train(taught)
    assert loop.train(untaught).steps == 1


def test_other_weights_are_why_a_run_has_signals_now(world, tmp_path):
    settings = own_lengths(world, tmp_path, strategy=stage_file(tmp_path, "weights: {kd: 0}"))
    loop.train(settings)
    stage_file(tmp_path, "weights: {kd: 1}")
    with pytest.raises(UserError, match=r"^--strategy: got one\.weights\.kd\.\w+ 1\.0; must be 0\.0, as in the run"):
        loop.train(settings)


def own_lengths(world, folder, **changes) -> TrainSettings:
    """A small run with a strategy whose stages have their own lengths."""
    common = survival.small_run(world, folder).model_dump(exclude_unset=True, exclude={"epochs"})
    return TrainSettings(**{**common, **changes})


def test_the_signals_of_a_stage_with_its_own_data_are_named_by_its_strategy(world, to_capture, tmp_path, monkeypatch):
    """They are where --signals does not reach."""
    taught = {"data": world.data, "teacher": str(world.teacher)}
    strategy = stage_file(tmp_path, "data: mixed, weights: {kd: 1}")
    settings = own_lengths(world, tmp_path, **taught, strategy=strategy)
    stopped_in_the_training_rows(lambda: loop.train(settings))
    how = r"as `signals` of stage one in the file of --strategy"
    with pytest.raises(UserError, match=rf"^--teacher: got .*; to train on what is there, give \S+signals {how}; to"):
        loop.train(changed(settings, teacher=str(tmp_path / "nothing")))
    loop.train(settings)
    folder = tmp_path / "teacher_signals"
    moved = folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(training_signals, "capture", None)
    named = r"^--strategy: stage one: signals: got \S+signals; must hold"
    with pytest.raises(UserError, match=rf"{named} the signals that the run that .* folder {how}, or give"):
        loop.train(settings)
    moved.rename(folder)
    manifest = read_manifest("", folder)
    write_manifest(folder, manifest.model_copy(update={"shards": manifest.shards[:-1]}))
    with pytest.raises(UserError, match=rf"{named} exactly the signals that the run that \S+run holds"):
        loop.train(settings)


@pytest.mark.parametrize("strategy", ["v4-unified", "stage2-v3-gentle"])
def test_a_run_needs_the_checkpoint_that_it_started_from_only_once(world, tmp_path, strategy):
    first, second = (
        loop.train(survival.small_run(world, tmp_path / name, seed=seed, max_steps=1, no_teacher=True)).checkpoint
        for seed, name in enumerate(("first", "second"))
    )
    start = shutil.copy(first, tmp_path / "start.pt")
    whole, parts = (
        survival.small_run(world, tmp_path / name, strategy=strategy, start_from=start, max_steps=6)
        for name in ("whole", "parts")
    )
    loop.train(whole)
    interrupted(parts, 1)
    shutil.copy(second, start)
    with pytest.raises(UserError, match=r"^--start-from: got \S+start\.pt; must be the checkpoint that the run that "):
        loop.train(parts)
    start.unlink()
    left_out = parts.model_dump(exclude_unset=True, exclude={"start_from"})
    if strategy == "v4-unified":
        interrupted(type(parts)(**left_out), 3)
    else:  # the strategy would begin with its first stage
        with pytest.raises(UserError, match=r"^--start-from: got nothing; .* give a path without a file"):
            loop.train(type(parts)(**left_out))
    loop.train(parts)
    assert survival.result(parts) == survival.result(whole)
    assert load_checkpoint("", survival.last_checkpoint(parts)).settings["start_from"] is not None


def test_a_run_from_scratch_does_not_resume_from_another_start(world, tmp_path):
    settings = survival.small_run(world, tmp_path, max_steps=2)
    report = loop.train(settings)
    with pytest.raises(UserError, match=r"^--start-from: got \S+\.pt; must be left out, as in the run that"):
        loop.train(changed(settings, start_from=report.checkpoint))
    assert [line["step"] for line in read_metrics(report.metrics)] == [0, 1, 2]
