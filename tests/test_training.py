"""The run: alive in every term, the same bits from the same seed, exact after a stop, careful with what is there."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import OutOfMemory, TrainingStopped, UserError
from indraquantum.evaluation.held_out import unigram_cross_entropy
from indraquantum.inference.load import load_model
from indraquantum.learner import to_tensors
from indraquantum.metrics import FIELDS, read_metrics
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.model.readout import wrapped_phase
from indraquantum.teacher.signals import open_signals, verify_signals
from indraquantum.training import earlier, loop
from indraquantum.training import resume as training_resume
from indraquantum.training import run as runs
from indraquantum.training import signals as training_signals
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.engine import Engine
from indraquantum.training.optimizers import MuonAdamW
from indraquantum.training.parallel import SingleProcess
from indraquantum.training.plan import plan_run
from indraquantum.training.step import StepInput

SMALL = {
    "d_model": 14, "state_width": 14, "layers": 1, "heads": 2, "mlp_width": 22, "batch_tokens": 480,
    "learning_rate": 5e-3, "evaluate_every": 3, "epochs": 2,
}  # fmt: skip


def settings(world, tmp_path, **changes) -> TrainSettings:
    return TrainSettings(
        **{"data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs", "threads": 1, **SMALL, **changes}
    )


def same_checkpoints(first, second) -> bool:
    a, b = (load_checkpoint("", path) for path in (first, second))
    states_a, states_b = ([c.model, *c.optimizer["state"].values()] for c in (a, b))
    return a.step == b.step and all(
        torch.equal(x[key], y[key]) for x, y in zip(states_a, states_b, strict=True) for key in x
    )


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A whole run of two epochs with dropout."""
    folder = tmp_path_factory.mktemp("finished")
    return settings(world, folder, dropout=0.1), loop.train(settings(world, folder, dropout=0.1))


def test_a_run_learns_and_every_term_is_alive(world, finished):
    _, report = finished
    metrics = read_metrics(report.metrics)
    assert all(list(line) == list(FIELDS) for line in metrics)
    assert [line["step"] for line in metrics] == list(range(report.steps + 1))
    unigram = unigram_cross_entropy(open_dataset("--data", world.data))
    assert report.held_out["all"] < metrics[0]["held_out"]["all"] - 1
    assert report.held_out["all"] < unigram["all"] - 0.5
    for line in metrics[1:]:
        for term in ("ce", "kd", "kd_estimate", "phase", "magnitude"):
            assert line[term] != 0
        assert line["loss"] == pytest.approx(
            line["ce"] + line["kd_weight"] * line["kd"] + 0.1 * line["phase"] + 0.1 * line["magnitude"], rel=1e-4
        )
        assert line["phase_std"] > 0
        assert line["magnitude_std"] > 0
    assert metrics[1]["kd_weight"] == pytest.approx(0.01)
    assert metrics[-1]["kd_weight"] == pytest.approx(0.05)
    assert metrics[-1]["epoch"] == 2


@pytest.mark.parametrize("changes", [{"head": "born"}, {"projector": "gated", "residual": True}], ids=str)
def test_variants_for_study_learn_too_and_are_measured_by_their_own_logits(world, tmp_path, changes):
    report = loop.train(settings(world, tmp_path, **changes))
    metrics = read_metrics(report.metrics)
    assert report.held_out["all"] < metrics[0]["held_out"]["all"] - 0.5
    assert all(metrics[-1][term] != 0 for term in ("ce", "kd", "kd_estimate", "phase", "magnitude"))
    model, _ = load_model(report.checkpoint, torch.device("cpu"))
    dataset, losses = open_dataset("--data", world.data), []
    for row in range(dataset.validation.num_rows):
        batch = dataset.validation.batch(np.array([row]))
        ids, positions, segments = to_tensors(batch, torch.device("cpu")).values()
        logits = model(ids, position_ids=positions, segment_ids=segments).logits[0]
        labels = torch.from_numpy(batch.labels[0])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels >= 0])
    assert report.held_out["all"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_each_epoch_leaves_its_checkpoint(finished):
    run, report = finished
    names = [f"checkpoint_v4_epoch_{epoch}.{end}" for epoch in (1, 2) for end in ("json", "pt")]
    assert sorted(path.name for path in run.output.iterdir()) == [".lock", *names]
    assert report.checkpoint.name == "checkpoint_v4_epoch_2.pt"
    assert load_checkpoint("", report.checkpoint).finished


def test_a_stopped_run_resumes_to_the_same_bits(world, finished, tmp_path):
    run, report = finished
    again = settings(world, tmp_path, dropout=0.1)
    shutil.copytree(run.output, again.output)
    shutil.copytree(run.logs, again.logs)
    (again.output / "checkpoint_v4_epoch_2.pt").unlink()  # as if stopped after the first epoch, its log further on
    resumed = loop.train(again)
    assert same_checkpoints(report.checkpoint, resumed.checkpoint)

    def without_speed(path):
        return [{**line, "tokens_per_second": None} for line in read_metrics(path)]

    assert without_speed(resumed.metrics) == without_speed(report.metrics)


def test_a_run_with_a_state_width_resumes_to_the_same_bits_and_only_with_it(world, tmp_path):
    widths = {"d_model": 10, "state_width": 6, "no_teacher": True, "batch_tokens": 1440}
    run, again = (settings(world, tmp_path / name, **widths) for name in ("whole", "again"))
    report = loop.train(run)
    shutil.copytree(run.output, again.output)
    shutil.copytree(run.logs, again.logs)
    (again.output / report.checkpoint.name).unlink()  # as if stopped after the first epoch
    for other, meant in ((None, 4), (14, 14)):
        with pytest.raises(UserError, match=f"--state-width: got {meant}; must be 6, as in the run that"):
            loop.train(again.model_copy(update={"state_width": other}))
    assert same_checkpoints(report.checkpoint, loop.train(again).checkpoint)


def test_a_damaged_checkpoint_is_passed_over(world, finished, tmp_path, capsys):
    run, report = finished
    again = settings(world, tmp_path, dropout=0.1)
    shutil.copytree(run.output, again.output)
    damaged = bytearray((again.output / "checkpoint_v4_epoch_2.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (again.output / "checkpoint_v4_epoch_2.pt").write_bytes(damaged)
    resumed = loop.train(again)
    assert "warning: skipped damaged checkpoints" in capsys.readouterr().err
    assert same_checkpoints(report.checkpoint, resumed.checkpoint)


def test_a_finished_run_says_so_and_other_settings_are_refused(world, finished, capsys):
    run, report = finished
    fields = run.model_dump(exclude_none=True, exclude={"phase_spread", "no_teacher"})
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    before = report.checkpoint.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *arguments])
    assert exit_.value.code == 0
    assert "This run is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *arguments, "--phase-spread=2"])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert "--phase-spread: got 2.0; must be 0.02" in error
    assert report.checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "then", "weights_are_of", "must"),
    [
        ("residual", True, {"residual": False}, "--residual True, not False", "must be False"),
        ("state_width", 6, {}, "--state-width 6, not 14", "must be 14"),
    ],
)
def test_a_run_from_before_an_option_had_what_the_program_did_then(
    world, finished, tmp_path, monkeypatch, name, value, then, weights_are_of, must
):
    run, report = finished
    checkpoint = load_checkpoint("", report.checkpoint)
    older = replace(
        checkpoint,
        settings={other: value for other, value in checkpoint.settings.items() if not other.startswith(name)},
        model_config={other: value for other, value in checkpoint.model_config.items() if not other.startswith(name)},
    )
    for module in (runs, training_resume, earlier):
        monkeypatch.setattr(module, "load_checkpoint", lambda field, path: older)

    def started(**changes):
        wanted = settings(world, tmp_path, **changes)
        return loop.start_run(wanted, plan_run(wanted, open_dataset("--data", world.data)), torch.device("cpu"))

    again = started(dropout=0.1, no_teacher=True, start_from=report.checkpoint, **then)
    assert torch.equal(again.model.embedding.weight, checkpoint.model["embedding.weight"])
    with pytest.raises(UserError, match=f"--start-from: .* must be of a model with {weights_are_of}$"):
        started(**{name: value}, no_teacher=True, start_from=report.checkpoint)
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{option}: got {value}; {must}, as in the run of --resume \S+\.pt$"):
        loop.train(run.model_copy(update={name: value, "resume": str(report.checkpoint)}))
    assert loop.train(run.model_copy(update={"resume": str(report.checkpoint), **then})).steps == report.steps


def test_a_run_from_before_the_order_was_fixed_keeps_its_order(world, tmp_path, monkeypatch):
    """Its checkpoints don't say by which rule its rows are ordered: by NumPy's own permutation."""
    start = loop.start_run

    def started_before(*arguments, **options):
        run = start(*arguments, **options)
        run.plan = replace(run.plan, stages=tuple(replace(stage, order=1) for stage in run.plan.stages))
        return run

    with monkeypatch.context() as before:
        before.setattr(loop, "start_run", started_before)
        whole = loop.train(settings(world, tmp_path / "whole"))
    with monkeypatch.context() as before:
        before.setattr(loop, "start_run", started_before)
        before.setattr(
            loop, "save_checkpoint", lambda path, checkpoint: save_checkpoint(path, without_order(checkpoint))
        )
        # stop after the first epoch, so that the resumed run draws the order of the second
        before.setattr(loop, "take_step", interrupted_after(loop.take_step, whole.steps // 2))
        again = settings(world, tmp_path)
        with pytest.raises(SystemExit):
            loop.train(again)
    resumed = loop.train(again)
    assert same_checkpoints(whole.checkpoint, resumed.checkpoint)
    assert not same_checkpoints(whole.checkpoint, loop.train(settings(world, tmp_path / "new")).checkpoint)
    assert load_checkpoint("", resumed.checkpoint).settings["row_order"] == 1


def without_order(checkpoint):
    return replace(checkpoint, settings={k: v for k, v in checkpoint.settings.items() if k != "row_order"})


def interrupted_after(take_step, steps):
    def wrapped(run):
        metrics = take_step(run)
        if run.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    return wrapped


def test_runs_of_one_name_do_not_share_a_log_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = settings(world, tmp_path, output=Path("a/run"), logs=Path("logs"), max_steps=1)
    report = loop.train(first)
    before = report.metrics.read_bytes()
    other = first.model_copy(update={"output": tmp_path / "b" / "run"})
    with pytest.raises(UserError, match=r"--logs: got \S*logs/run; holds the metrics of \S+a/run; give another"):
        loop.train(other)
    assert report.metrics.read_bytes() == before
    assert not (tmp_path / "b").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the same folders have other names
    with pytest.raises(UserError, match=r"--logs: got \S*logs/run; holds the metrics of \S+a/run; give another"):
        loop.train(first.model_copy(update={"output": Path("../b/run"), "logs": Path("../logs")}))
    monkeypatch.chdir(tmp_path)
    shutil.move(first.output, other.output)  # the same run, at another place
    assert loop.train(other).steps == 1


def test_logs_may_stand_in_the_output_folder(world, tmp_path):
    report = loop.train(settings(world, tmp_path, logs=tmp_path, max_steps=1))
    assert report.metrics.parent == report.checkpoint.parent == tmp_path / "run"
    assert loop.train(settings(world, tmp_path, logs=tmp_path, max_steps=1)).steps == 1


@pytest.mark.parametrize("seed", [20251128123456, 2**63 - 1])
def test_any_seed_trains(world, tmp_path, seed):
    assert loop.train(settings(world, tmp_path, seed=seed, max_steps=1)).steps == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 3}, "--heads: got 3; must divide the width 28"),
        ({"optimizer": "adamw", "muon_rate": 3}, "--muon-rate: got 3.0; must be 1 without --optimizer muon"),
        ({"projector": "none", "ends": "separate"}, "--ends: got separate; must be shared with --projector none"),
        ({"projector": "none", "state_width": 14}, "--state-width: got 14; must be left out with --projector none"),
        ({"resume": "nowhere.pt"}, "--resume: got nowhere.pt; must be auto, never, or the path of a checkpoint"),
    ],
)  # fmt: skip
def test_what_no_run_can_begin_with_is_refused_before_the_teacher_is_asked(world, tmp_path, changes, said):
    shutil.copytree(world.data, tmp_path / "mixed")
    wanted = settings(world, tmp_path, data=tmp_path / "mixed", teacher=str(world.teacher), **changes)
    with pytest.raises(UserError, match=re.escape(said)):
        loop.train(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_max_steps_ends_inside_an_epoch_and_keeps_its_checkpoint(world, tmp_path):
    report = loop.train(settings(world, tmp_path, max_steps=2))
    assert report.steps == 2
    assert report.checkpoint.name == "checkpoint_v4_epoch_1.pt"
    assert read_metrics(report.metrics)[-1]["kd_weight"] == pytest.approx(0.05)  # schedules end where the run does


def test_a_pickle_trains_too(world, tmp_path):
    report = loop.train(
        settings(world, tmp_path, data=world.pickle, tokenizer=str(world.tokenizer), no_teacher=True, max_steps=1)
    )
    assert read_metrics(report.metrics)[-1]["kd"] is None


def test_signals_are_captured_where_there_are_none(world, tmp_path):
    data = tmp_path / "mixed"
    shutil.copytree(world.data, data)
    loop.train(settings(world, tmp_path, data=data, teacher=str(world.teacher), max_steps=1))
    manifest = (tmp_path / "teacher_signals" / "manifest.json").read_text()
    assert manifest == (world.signals / "manifest.json").read_text().replace(str(world.signals), str(tmp_path))


def test_without_signals_and_teacher_the_way_out_is_named(world, tmp_path):
    data = tmp_path / "mixed"
    shutil.copytree(world.data, data)
    with pytest.raises(UserError, match=r"--teacher.*--no-teacher"):
        loop.train(settings(world, tmp_path, data=data, teacher=str(tmp_path / "nothing")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def step_parts(world, **changes):
    dataset = open_dataset("--data", world.data)
    config = IndraQuantumConfig.from_settings(
        TrainSettings(**{**SMALL, **changes}),
        vocab_size=dataset.tokenizer.vocabulary_size,
        bos_token_id=dataset.tokenizer.bos_id,
        eos_token_id=dataset.tokenizer.eos_id,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = IndraQuantumPhase2(config).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 10.0, 0.0))
    return dataset, model, optimizer, open_signals("--signals", world.signals, dataset)


@pytest.mark.parametrize("alive", ["kd_weight", "phase_weight", "magnitude_weight"])
def test_each_weight_changes_the_gradient(world, alive):
    gradients = []
    for weight in (0.0, 0.3):
        dataset, model, optimizer, signals = step_parts(world)
        step = StepInput(dataset.train, np.arange(7), 7, 1e-3, max_grad_norm=1e9, signals=signals, **{alive: weight})
        Engine(SingleProcess(model), optimizer).step(step)
        gradients.append(model.embedding.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_the_micro_batch_option_changes_a_run_by_rounding_only(world, tmp_path):
    lines = []
    for micro_batch_tokens in (8192, 100):  # ten rows of 48 at a time, or two
        run = settings(world, tmp_path / str(micro_batch_tokens), micro_batch_tokens=micro_batch_tokens, max_steps=3)
        lines.append([line["loss"] for line in read_metrics(loop.train(run).metrics)[1:]])
    assert lines[0] != lines[1]
    assert lines[0] == pytest.approx(lines[1], rel=2e-5)


@pytest.mark.parametrize(("projector", "residual"), [("quantum", True), ("quantum", False), ("none", False)])
def test_micro_batches_add_up_to_the_whole_step(world, projector, residual):
    results = []
    for micro_batch_rows in (11, 2):
        widths = {"state_width": None if projector == "none" else 14, "heads": 1}
        dataset, model, optimizer, signals = step_parts(world, projector=projector, residual=residual, **widths)
        if residual:  # as large as without one, or the phases' gradients are too small for the bound below
            for part in (model.projector, model.input_projector):
                part.magnitude.weight.data *= 10
        engine, weights = Engine(SingleProcess(model), optimizer), {"kd_weight": 0.3, "phase_weight": 0.2}
        for rows in (np.arange(20, 27), np.arange(11)):  # nothing of the first step may reach the second
            result = engine.step(
                StepInput(
                    dataset.train, rows, micro_batch_rows, learning_rate=0.0, max_grad_norm=1e9, signals=signals,
                    magnitude_weight=0.1, **weights,
                )
            )  # fmt: skip
        results.append((result, {name: p.grad for name, p in model.named_parameters()}))
    (whole, gradients), (pieces, summed) = results
    assert pieces.terms == pytest.approx(whole.terms, rel=1e-5)
    assert pieces.tokens == whole.tokens
    for name, gradient in gradients.items():
        assert (summed[name] - gradient).norm() <= 1e-4 * gradient.norm()


def test_a_loss_that_is_not_finite_stops_before_the_update(world):
    dataset, model, optimizer, signals = step_parts(world)
    with torch.no_grad():
        model.embedding.weight[:] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters() if "embedding" not in name}
    with pytest.raises(TrainingStopped, match="weights are not finite before the step begins"):
        Engine(SingleProcess(model), optimizer).step(
            StepInput(dataset.train, np.arange(3), 3, learning_rate=1e-3, signals=signals, kd_weight=0.05)
        )
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
    assert TrainingStopped.exit_status == 3


def test_phases_wrap_far_from_their_targets():
    angles = torch.tensor([0.0, 1.0, 3.1, -3.1, -1.5, -1.6])
    wrapped = wrapped_phase(angles)
    expected = torch.tensor([0.0, 1.0, 3.1, 2 * torch.pi - 3.1, -1.5, 2 * torch.pi - 1.6])
    torch.testing.assert_close(wrapped, expected)


def test_signals_without_a_training_row_are_refused(world, tmp_path, monkeypatch):
    def stopped_early(*arguments):
        store = verify_signals(*arguments)
        store.coverage = 0.0
        return store

    monkeypatch.setattr(training_signals, "verify_signals", stopped_early)
    with pytest.raises(UserError, match="must cover a training row"):
        loop.train(settings(world, tmp_path))
    assert not list((tmp_path / "run").glob("*.pt*"))


def test_a_bias_that_starts_at_the_frequencies_begins_at_their_loss(world, tmp_path):
    dataset = open_dataset("--data", world.data)
    begun = []
    for name, start in (("zeros", "zeros"), ("known", "frequencies")):
        run = settings(world, tmp_path / name, bias_start=start, residual=False, max_steps=1, learning_rate=1e-9)
        report = loop.train(run)
        begun.append(read_metrics(report.metrics)[0]["held_out"]["all"])
    frequencies = unigram_cross_entropy(dataset)["all"]
    assert begun[1] == pytest.approx(frequencies, abs=0.15)
    assert begun[0] == pytest.approx(math.log(dataset.tokenizer.vocabulary_size), abs=0.15)
    assert frequencies < begun[0] - 0.3
    bias_V = load_checkpoint("", report.checkpoint).model["head.bias_V"].numpy()
    labels = np.concatenate([dataset.train.batch(np.arange(dataset.train.num_rows)).labels.reshape(-1)])
    counts_V = np.bincount(labels[labels >= 0], minlength=len(bias_V)) + 1
    np.testing.assert_allclose(bias_V, np.log(counts_V / counts_V.sum()), atol=1e-5)


@pytest.mark.parametrize("place", ["model", "optimiser"])
def test_a_model_that_does_not_fit_into_memory_is_one_line(world, tmp_path, monkeypatch, place):
    """A new model that moves to its device, and the state of the optimiser of a run that resumes."""
    wanted = settings(world, tmp_path, no_teacher=True, max_steps=2, save_every=1)
    if place == "optimiser":
        loop.train(wanted).checkpoint.unlink()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(*((runs, "accelerate") if place == "model" else (MuonAdamW, "load_state_dict")), full)
    with pytest.raises(OutOfMemory, match=r"^--device: got cpu; must have free memory for the model; end other"):
        loop.train(wanted)
