"""`indra train --dry-run`: counts against the built model and torch's own counters, and nothing on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.errors import OutOfMemory, UserError
from indraquantum.kernels.onednn import is_exact
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.training import loop
from indraquantum.training.run import trial_run
from indraquantum.trials import dry_run as costly
from indraquantum.trials.costs import StepSize, parameter_counts, step_flops
from indraquantum.trials.dry_run import activation_bytes, dry_run, duration, measure

SMALL = {"d_model": 14, "layers": 3, "heads": 2, "mlp_width": 22, "batch_tokens": 480}


def settings(world, tmp_path, **changes) -> TrainSettings:
    folders = {"data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs"}
    return TrainSettings(**{**folders, "threads": 1, **SMALL, **changes})


def model_of(vocab_size=331, attention="eager", **changes) -> IndraQuantumPhase2:
    config = IndraQuantumConfig.from_settings(TrainSettings(**{**SMALL, **changes}), vocab_size, 1, 2)
    config._attn_implementation = attention
    return IndraQuantumPhase2(config).train()


@pytest.mark.parametrize(("d", "state_width", "c"), [(14, None, 6), (14, 14, 14), (13, 6, 6), (7, 22, 22)])
def test_parameters_by_hand(d, state_width, c):
    widths = {"d_model": d, "state_width": state_width}
    assert parameter_counts(model_of(ends="shared", **widths))["projector"] == 2 * (d * c + c)
    assert parameter_counts(model_of(**widths)) == {
        "table": 331 * d,
        "projector": 4 * (d * c + c),
        "layers": 3 * (4 * (2 * c) ** 2 + 3 * 2 * c * 22 + 2 * 2 * c) + 2 * c,
        "head": 331 + 1,
        "readout": 2 * c,
        "all": sum(p.numel() for p in model_of(**widths).parameters()),
    }


@pytest.mark.parametrize("ends", ["shared", "separate"])
@pytest.mark.parametrize("projector", ["quantum", "phase-only", "frozen", "gated", "linear", "mlp", "none"])
def test_flops_are_what_torch_counts(projector, ends):
    if (projector, ends) == ("none", "separate"):
        with pytest.raises(UserError, match="--ends"):
            model_of(projector=projector, ends=ends)
        return
    objective = SemanticDistillationLoss(0.1, 0.1, 0.1, implementation="reference")
    for state_width, width in ((None, 14),) if projector == "none" else ((None, 14), (14, 28), (9, 18)):
        model = model_of(projector=projector, heads=1, ends=ends, state_width=state_width)
        assert flops_of_objective(model, objective) == 3 * 2 * LABELLED * 331 * width


def test_flops_of_borns_rule_are_those_of_two_products_and_of_building_them_again():
    objective = SemanticDistillationLoss(0.1, 0.1, 0.1, head="born")
    assert flops_of_objective(model_of(head="born", heads=1, state_width=14), objective) == 8 * 2 * LABELLED * 331 * 28


ROWS, LENGTH = 3, 37
LABELLED = ROWS * LENGTH - 11


def flops_of_objective(model: IndraQuantumPhase2, objective: SemanticDistillationLoss) -> int:
    """FLOPs of the objective in a step, after a check that those of the whole step are what torch counts."""
    rows, length = ROWS, LENGTH
    ids_BT = torch.randint(3, 331, (rows, length))
    labels_N = ids_BT.flatten().clone()[:LABELLED]
    teacher = TeacherSignals(labels_N[:, None], torch.ones(len(labels_N), 1), *torch.rand(2, len(labels_N)))
    is_exact()  # its own products are not to be counted
    with FlopCounterMode(display=False) as counter:
        table_VD = model.lift_table()
        leaf_VD = table_VD.detach().requires_grad_()
        segments_BT = torch.zeros_like(ids_BT)
        states_ND = model.hidden_states(ids_BT, None, segments_BT, leaf_VD).flatten(0, 1)[: len(labels_N)]
        amplitude_N = model.amplitude(states_ND)
        terms = objective(states_ND, leaf_VD, labels_N, model.bias_V, model.scale, teacher, amplitude_N)
        terms.total.backward()
        table_VD.backward(leaf_VD.grad)
    expected = counter.get_total_flops()
    found = step_flops(model, StepSize(rows, length, len(labels_N)))
    assert found["all"] == expected
    return found["objective"]


@pytest.mark.parametrize("ends", ["shared", "separate"])
def test_a_sampled_step_takes_the_flops_that_torch_counts(world, tmp_path, ends):
    given = settings(
        world, tmp_path, softmax="sampled", no_teacher=True, ends=ends, optimizer="adamw", heads=1, state_width=9
    )
    run = trial_run(given)
    run.model.config._attn_implementation = run.model.backbone.config._attn_implementation = "eager"
    step = run.plan.step(0)
    batch = step.split.batch(step.rows)
    chosen = run.engine.sampler.of_step(step.seed, [batch.labels])
    objective = SemanticDistillationLoss(0.0, implementation="reference")
    with FlopCounterMode(display=False) as counter:
        passed = run.parallel.run_pass(batch, None, objective, 100, candidates=chosen)
        passed.terms.total.backward()
    size = StepSize(len(step.rows), batch.input_ids.shape[1], int(batch.labelled.sum()), len(chosen.ids_R))
    flops = step_flops(run.model, size)
    flops["all"] -= flops["readout"] * 2 // 3  # without a teacher nothing goes back through it
    assert flops["all"] == counter.get_total_flops()
    assert flops["objective"] < 0.6 * step_flops(run.model, replace(size, compared=None))["objective"]
    assert measure(run).size == size


def test_a_dry_run_writes_nothing_and_counts_what_is_trained(world, tmp_path, capsys):
    wanted = settings(world, tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--dry-run", f"--data={world.data}", f"--output={wanted.output}", f"--logs={wanted.logs}",
                  "--d-model=14", "--layers=3", "--heads=2", "--mlp-width=22", "--batch-tokens=480"])  # fmt: skip
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    found = dry_run(wanted)
    assert f"parameters: {found.parameters['all']:,}" in out
    run = trial_run(wanted)
    assert found.total_steps == run.total_steps
    assert found.size == StepSize(10, 48, found.size.labelled)
    assert found.parameters == parameter_counts(run.model)
    assert found.bytes["weights"] == found.bytes["gradients"] == 4 * found.parameters["all"]
    assert found.bytes["averaged weights"] == 0
    averaged = measure(trial_run(settings(world, tmp_path, ema_decay=0.9, optimizer="adamw")))
    assert averaged.bytes["averaged weights"] == 4 * found.parameters["all"]
    # AdamW keeps two moments of each parameter, and a float32 counter of steps for each tensor
    assert averaged.bytes["optimiser"] == 8 * found.parameters["all"] + 4 * len(list(run.model.parameters()))
    # Muon keeps one momentum of each matrix of the layers and no counter
    matrices = 3 * (4 * 12 * 12 + 3 * 12 * 22)
    assert found.bytes["optimiser"] == averaged.bytes["optimiser"] - 4 * matrices - 4 * 3 * 7
    assert found.bytes["objective's buffer"] == found.size.labelled * run.model.config.vocab_size * 4
    assert found.bytes["all"] == sum(value for name, value in found.bytes.items() if name != "all")
    assert found.seconds_to_finish > run.total_steps * found.seconds_per_step > 0


def test_half_the_state_width_costs_what_a_plain_model_costs_but_for_the_lift(world, tmp_path, capsys):
    plain = dry_run(settings(world, tmp_path, d_model=28, projector="none", no_teacher=True)).flops
    found = dry_run(settings(world, tmp_path, d_model=28, state_width=14, no_teacher=True))
    out = capsys.readouterr().out
    # The table is lifted once, the inputs once more: magnitude and phase, forward and backward.
    lift = 3 * 2 * 2 * 28 * 14
    apart = {"lift": lift * 320, "inputs": lift * found.size.rows * 48}
    assert found.flops == {**plain, **apart, "all": plain["all"] + sum(apart.values())}
    assert "projector: 14x28 14\ninput_projector: 14x28 14\n" in out
    assert f"FLOPs a token: {found.flops['all'] / found.step_tokens / 1e6:,.3f} M" in out
    assert 0 < found.seconds_per_step < found.seconds_to_finish


def test_activations_grow_with_rows_and_layers(world, tmp_path):
    def kept(rows, **changes):
        run = trial_run(settings(world, tmp_path, **changes))
        return activation_bytes(run, np.arange(rows))

    one, two = kept(2, layers=1), kept(2, layers=2)
    inputs = 2 * 48 * (28 * 4 + 8)  # each row's inputs and their token ids
    assert one > inputs
    assert kept(4, layers=1) == pytest.approx(2 * one, rel=0.05)
    assert kept(2, layers=3) - two == pytest.approx(two - one, rel=0.01)


def test_activations_of_16_bits_are_smaller(world, tmp_path):
    kept = {}
    for precision in ("float32", "bfloat16"):
        # Attention of short rows stays float32, so the MLP has to be as wide beside it as in real models.
        run = trial_run(settings(world, tmp_path, layers=3, mlp_width=75, precision=precision))
        kept[precision] = activation_bytes(run, np.arange(4))
    assert 0.5 * kept["float32"] < kept["bfloat16"] < 0.9 * kept["float32"]


def test_a_forward_pass_that_does_not_fit_into_memory_is_one_line(world, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    run = trial_run(settings(world, tmp_path))
    monkeypatch.setattr(run.model, "hidden_states", full)
    with pytest.raises(OutOfMemory, match=r"^--micro-batch-tokens: got \d+; must be smaller"):
        activation_bytes(run, np.arange(4))


def test_each_stage_is_timed(world, tmp_path, monkeypatch):
    """A step of stage 1 takes a second here, one with the teacher ten."""
    run = trial_run(settings(world, tmp_path, strategy="stage2-v3-gentle"))
    monkeypatch.setattr(costly, "_step_seconds", lambda _, stage: 1.0 if stage.number == 0 else 10.0)
    monkeypatch.setattr(costly, "evaluation_seconds", lambda _: 0.5)
    first, second = (stage.steps for stage in run.plan.stages)
    found, steps = measure(run), range(run.total_steps + 1)
    evaluated = {step for step in steps if run.plan.epoch_ends(step) or step % run.settings.evaluate_every == 0}
    evaluations = len(evaluated | {run.total_steps})
    assert (found.seconds_per_step, found.seconds_to_finish) == (1.0, first + 10 * second + 0.5 * evaluations)


def test_a_dry_run_says_which_loss_such_runs_reached(world, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(costly, "expected_loss", lambda run, tokens: asked.append(tokens) or 3.456)
    run = trial_run(settings(world, tmp_path, strategy="stage2-v3-gentle"))
    dry_run(settings(world, tmp_path, strategy="stage2-v3-gentle"))
    assert (
        "held-out loss: on WikiText and Alpaca, such a run ended at about 3.46 nats per token"
        in capsys.readouterr().out
    )
    tokens = [stage.steps * 10 * stage.train.num_tokens / stage.train.num_rows for stage in run.plan.stages]
    assert asked == [round(sum(tokens))]  # 480 tokens of 48 a row are 10 rows, which are not all full
    assert 0.9 < asked[0] / (run.total_steps * 480) <= 1
    monkeypatch.undo()
    dry_run(settings(world, tmp_path))  # another size than the default model's
    assert "held-out loss" not in capsys.readouterr().out


def test_a_dry_run_of_a_run_that_resumes_needs_no_start(world, tmp_path, capsys):
    first = loop.train(settings(world, tmp_path / "first", no_teacher=True, max_steps=1))
    start = shutil.copy(first.checkpoint, tmp_path / "start.pt")
    second = settings(world, tmp_path, no_teacher=True, max_steps=1, start_from=start)
    loop.train(second)
    start.unlink()
    assert dry_run(second).total_steps == 1
    with pytest.raises(UserError, match=r"--start-from: got \S+start\.pt"):
        dry_run(second.model_copy(update={"output": tmp_path / "other"}))


def test_a_dry_run_goes_on_without_signals(world, tmp_path, capsys):
    data = tmp_path / "mixed"
    data.mkdir()
    for path in world.data.rglob("*"):
        target = data / path.relative_to(world.data)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    run = trial_run(settings(world, tmp_path, data=data))
    assert run.stage.signals is None
    assert "No teacher signals" in capsys.readouterr().out
    assert measure(run).flops["readout"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


@pytest.mark.parametrize(("seconds", "said"), [(59.4, "59 s"), (61, "1 min 1 s"), (3600 * 40 + 130, "40 h 2 min")])
def test_durations_are_said_in_words(seconds, said):
    assert duration(seconds) == said
