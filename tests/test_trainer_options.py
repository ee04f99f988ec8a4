"""Precision, averaged weights, early stopping, Muon, gradient checkpointing: each does what it says, no more."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_utils

from indraquantum import cli
from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import TrainingStopped, UserError
from indraquantum.evaluation.held_out import held_out_cross_entropy
from indraquantum.inference.load import load_model
from indraquantum.kernels import onednn
from indraquantum.loss_v2 import SemanticDistillationLoss
from indraquantum.metrics import read_metrics
from indraquantum.model.attention import attend_as
from indraquantum.teacher.capture import capture
from indraquantum.training import loop, optimizers, parallel
from indraquantum.training import run as training_run
from indraquantum.training.checkpoint import BEST_NAME, load_checkpoint, save_checkpoint
from indraquantum.training.parallel import Precision, WeightAverage, choose_precision
from indraquantum.training.resume import resume
from indraquantum.training.run import BestHeldOut, trial_run
from indraquantum.trials.dry_run import activation_bytes

SMALL = {
    "d_model": 14, "layers": 2, "heads": 2, "mlp_width": 22, "batch_tokens": 480, "learning_rate": 5e-3, "epochs": 1,
    "device": "cpu", "threads": 1,
}  # fmt: skip


def settings(world, tmp_path, **changes) -> TrainSettings:
    return TrainSettings(
        **{"data": world.data, "output": tmp_path / "run", "logs": tmp_path / "logs", **SMALL, **changes}
    )


def losses(run, steps: int) -> list[float]:
    return [loop.take_step(run)["loss"] for _ in range(steps)]


# --- precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_stay_near_float32_and_weights_stay_float32(world, tmp_path, precision):
    exact = losses(trial_run(settings(world, tmp_path)), 6)
    run = trial_run(settings(world, tmp_path, precision=precision))
    rounded = losses(run, 6)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_only_products_are_16_bits(world, tmp_path, name, dtype):
    run = trial_run(settings(world, tmp_path, precision=name))
    seen = {}
    run.model.backbone.layers[0].mlp.down_proj.register_forward_hook(lambda *call: seen.update(layer=call[2].dtype))
    original = SemanticDistillationLoss.__call__

    def objective(self, states_ND, table_VD, *arguments, **options):
        seen.update(
            states=states_ND.dtype,
            table=table_VD.dtype,
            loss=(terms := original(self, states_ND, table_VD, *arguments, **options)).total.dtype,
        )
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SemanticDistillationLoss, "__call__", objective)
        loop.take_step(run)
    of_objective = torch.float32 if dtype is torch.float16 else dtype
    assert seen == {"layer": dtype, "states": of_objective, "table": torch.float32, "loss": torch.float32}


def test_a_run_of_before_keeps_its_objective_in_float32(world, tmp_path):
    """A run begun when only the layers used bfloat16 resumes as it began."""
    begun = settings(world, tmp_path, precision="bfloat16", max_steps=4, save_every=2, keep_last=9)
    loop.train(begun)
    (tmp_path / "run" / "checkpoint_v4_epoch_1.pt").unlink()
    (tmp_path / "run" / "checkpoint_v4_step_4.pt").unlink(missing_ok=True)
    before = tmp_path / "run" / "checkpoint_v4_step_2.pt"
    checkpoint = load_checkpoint("", before)
    assert checkpoint.settings.pop("objective_precision") == "bfloat16"
    assert checkpoint.settings.pop("attention_precision") == "eager"
    save_checkpoint(before, checkpoint)
    run = trial_run(begun)
    assert resume(run)
    assert (run.parallel.precision.dtype, run.parallel.precision.objective) == (torch.bfloat16, torch.float32)
    assert run.identity["objective_precision"] == "float32"
    assert attention_of_a_step(run) == {torch.bfloat16}


def attention_of_a_step(run):
    """The formats in which torch computes attention in a step: autocast's, inside it."""
    seen, attend = set(), F.scaled_dot_product_attention

    def attention(query, *arguments, **options):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype)
        return attend(query, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        loop.take_step(run)
    return seen


@pytest.mark.parametrize("attention", ["eager", "float32"])
def test_each_attention_keeps_documents_apart_alike(world, tmp_path, attention):
    """The mask that torch's attention takes would let all through in eager attention."""
    run = trial_run(settings(world, tmp_path))
    ids = torch.randint(3, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 3 + [2] * 4 + [-1] * 3])
    positions = torch.tensor([[*range(5), *range(7)], [*range(2), *range(3), *range(4), 0, 0, 0]])
    model = run.model.eval()
    with torch.no_grad():
        expected = model.hidden_states(ids, positions, segments)
        attend_as(model.backbone, attention)
        found = model.hidden_states(ids, positions, segments)
    assert model.backbone.config._attn_implementation != "sdpa"
    real = segments >= 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_a_run_that_began_with_attention_in_float32_keeps_it(world, tmp_path):
    begun = settings(world, tmp_path, precision="bfloat16", max_steps=4, save_every=2, keep_last=9)
    loop.train(begun)
    (tmp_path / "run" / "checkpoint_v4_epoch_1.pt").unlink()
    before = tmp_path / "run" / "checkpoint_v4_step_2.pt"
    checkpoint = load_checkpoint("", before)
    checkpoint.settings["attention_precision"] = "float32"
    save_checkpoint(before, checkpoint)
    run = trial_run(begun)
    assert resume(run)
    assert run.identity["attention_precision"] == "float32"
    assert attention_of_a_step(run) == {torch.float32}


def test_a_run_that_began_with_other_defaults_keeps_them(world, tmp_path):
    """An option that isn't given keeps its value, also one that the run's version did not have."""
    length = {"max_steps": 4, "save_every": 2, "keep_last": 9}
    before = {"table_rate": 50.0, "projector_rate": 0.4, "precision": "float32"}
    before |= {"bias_start": "zeros", "table_start": "normal"}
    whole = loop.train(settings(world, tmp_path / "whole", **length, **before))
    parts = loop.train(settings(world, tmp_path / "parts", **length, **before))
    parts.checkpoint.unlink()
    for path in parts.checkpoint.parent.glob("*step_4.pt"):
        path.unlink()
    half = parts.checkpoint.parent / "checkpoint_v4_step_2.pt"
    checkpoint = load_checkpoint("", half)
    for name in ("bias_start", "table_start"):
        del checkpoint.settings[name]
    save_checkpoint(half, checkpoint)
    now = settings(world, tmp_path / "parts", **length)
    assert all(getattr(now, name) != value for name, value in before.items())
    resumed = loop.train(now)
    expected, found = (load_checkpoint("", report.checkpoint).model for report in (whole, resumed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match="--table-rate"):
        loop.train(settings(world, tmp_path / "parts", **length, table_rate=20.0))


@pytest.mark.parametrize("model", [{}, {"ends": "shared"}, {"projector": "none", "heads": 1}], ids=str)
def test_a_run_from_before_the_residual_was_the_default_resumes_without_one(world, tmp_path, model):
    length = {"max_steps": 4, "save_every": 2, "keep_last": 9, "table_start": "cooccurrence"}
    then = {**length, **model, "residual": False}
    if "projector" not in model:
        then["state_width"] = 14  # as wide as the table, which was the default
    whole = loop.train(settings(world, tmp_path / "whole", **then))
    loop.train(settings(world, tmp_path / "parts", **then)).checkpoint.unlink()
    half = tmp_path / "parts" / "run" / "checkpoint_v4_step_2.pt"
    for path in half.parent.glob("*.pt"):
        if path != half:
            path.unlink()
    checkpoint = load_checkpoint("", half)
    for name in ("residual", "residual_head"):
        del checkpoint.settings[name]
        del checkpoint.model_config[name]
    checkpoint.settings["state_width"] = checkpoint.model_config["state_width"] = None
    save_checkpoint(half, checkpoint)
    resumed = loop.train(settings(world, tmp_path / "parts", **length, **model))
    expected, found = (load_checkpoint("", report.checkpoint).model for report in (whole, resumed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, (6, 22, True, "turned", "bigrams")), ({"ends": "shared"}, (6, 22, False, "same", "cooccurrence")),
        ({"projector": "none", "heads": 1}, (None, 22, False, "same", "cooccurrence")),
        ({"residual": False, "table_start": "normal"}, (6, 22, False, "same", "normal")),
        ({"mlp_width": None, "heads": 1}, (7, 48, True, "turned", "bigrams")),
    ],
)  # fmt: skip
def test_what_follows_from_other_options_is_recorded_and_can_be_given_again(world, tmp_path, model, expected):
    given = settings(world, tmp_path, max_steps=1, **model)
    loop.train(given)
    record = json.loads((given.logs / "run" / "run.json").read_text())["settings"]
    names = ("state_width", "mlp_width", "residual", "residual_head", "table_start")
    assert tuple(record[name] for name in names) == expected
    again = type(given)(**{name: record[name] for name in names}, **given.model_dump(exclude=set(names)))
    assert again.decided() == given.decided() == dict(zip(names, expected, strict=True))


def test_short_rows_attend_by_products(world, tmp_path, monkeypatch):
    """There torch's own attention is slower on CPUs in bfloat16."""
    given = settings(world, tmp_path, precision="bfloat16")
    run = trial_run(given)
    assert attention_of_a_step(run) == set()
    assert run.identity["attention_precision"] == "eager"
    monkeypatch.setattr(training_run, "SHORT", run.dataset.row_length)
    long = trial_run(given)
    assert attention_of_a_step(long) == {torch.bfloat16}
    assert long.identity["attention_precision"] == "layers"
    assert trial_run(settings(world, tmp_path)).identity["attention_precision"] == "layers"


def test_phases_of_the_inputs_own_projector_stay_float32(world, tmp_path):
    run, seen = trial_run(settings(world, tmp_path, precision="bfloat16", ends="separate")), []
    run.model.input_projector.phase.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    loop.take_step(run)
    assert seen == [torch.float32]


@pytest.mark.parametrize(("units", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_is_16_bits_on_a_cpu_that_has_units_for_them(world, tmp_path, monkeypatch, units, dtype):
    monkeypatch.setattr(parallel, "has_16_bit_units", lambda: units)
    chosen = choose_precision(settings(world, tmp_path, precision="auto"), torch.device("cpu"))
    assert (chosen.dtype, chosen.scaler.is_enabled(), chosen.may_overflow) == (dtype, False, False)


def test_what_auto_has_chosen_is_part_of_a_run(world, tmp_path, monkeypatch):
    """Else a run begun on a CPU went on in 16 bits on a GPU."""
    monkeypatch.setattr(parallel, "has_16_bit_units", lambda: False)
    run = settings(world, tmp_path, precision="auto", max_steps=2)
    assert loop.train(run).steps == 2
    assert loop.train(run.model_copy(update={"precision": "float32"})).steps == 2
    monkeypatch.setattr(training_run, "choose_precision", lambda settings, device: Precision(torch.bfloat16, device))
    with pytest.raises(UserError, match="--precision: got bfloat16; must be float32, as in the run that"):
        loop.train(run)


def test_a_run_in_float32_resumes_on_a_device_whose_16_bits_need_a_loss_scale(world, tmp_path, monkeypatch):
    run = settings(world, tmp_path, max_steps=4, save_every=2, keep_last=9)
    whole = loop.train(run)
    expected = load_checkpoint("", whole.checkpoint).model
    for path in whole.checkpoint.parent.glob("*.pt"):
        if not path.name.endswith("step_2.pt"):
            path.unlink()
    monkeypatch.setattr(training_run, "choose_precision", lambda settings, device: Precision(torch.float16, device))
    again = trial_run(run)
    assert resume(again)
    assert not again.parallel.precision.scaler.is_enabled()
    found = load_checkpoint("", loop.train(run).checkpoint).model
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def likeliest(world, tmp_path_factory):
    """Signals of the 2 likeliest tokens, which leave out most of the teacher's probability."""
    signals = tmp_path_factory.mktemp("likeliest") / "signals"
    capture(CaptureSettings(data=world.data, teacher=str(world.teacher), output=signals, kind="topk", top_k=2))
    return signals


def test_what_the_likeliest_tokens_lack_is_a_bucket_unless_told_otherwise(world, tmp_path, likeliest):
    found = {}
    for tail in ("auto", "bucket", "none", "uniform"):
        run = trial_run(settings(world, tmp_path, signals=likeliest, tail=tail, kd_weight_start=1.0))
        found[tail] = loop.take_step(run)["kd"]
        assert run.identity["tail"] == run.plan.step(0).tail == ("bucket" if tail == "auto" else tail)
    assert found["auto"] == found["bucket"]
    assert found["none"] not in (found["bucket"], found["uniform"])
    assert found["bucket"] < found["uniform"]  # lumping outcomes together never makes two distributions differ more
    drawn = trial_run(settings(world, tmp_path, tail="auto"))
    loop.take_step(drawn)
    assert drawn.identity["tail"] == drawn.plan.step(0).tail == "none"


def test_a_run_of_before_there_was_a_tail_goes_on_without_one(world, tmp_path, likeliest):
    """A run keeps its objective from start to end, whatever the default is by then, and after a second stop too."""
    without = settings(
        world, tmp_path, signals=likeliest, tail="none", kd_weight_start=1.0, max_steps=6, save_every=2, keep_last=9
    )
    report, expected = loop.train(without), load_checkpoint("", tmp_path / "run" / "checkpoint_v4_epoch_1.pt")
    before = tmp_path / "run" / "checkpoint_v4_step_2.pt"
    checkpoint = load_checkpoint("", before)
    assert checkpoint.settings.pop("tail") == "none"
    save_checkpoint(before, checkpoint)
    again = without.model_copy(update={"tail": "auto"})
    for step in (2, 4):  # the first time from a file that says nothing of a tail, then from one that does
        for later in (f"step_{step + 2}", "epoch_1"):
            (tmp_path / "run" / f"checkpoint_v4_{later}.pt").unlink(missing_ok=True)
        if step == 2:
            with pytest.raises(UserError, match="--tail: got bucket; must be none, as in the run that"):
                loop.train(without.model_copy(update={"tail": "bucket"}))
        assert loop.train(again) == report
        found = load_checkpoint("", report.checkpoint)
        assert found.settings == expected.settings
        assert all(torch.equal(weight, expected.model[name]) for name, weight in found.model.items())
    assert json.loads((report.metrics.parent / "run.json").read_text())["settings"]["tail"] == "none"


def test_the_likeliest_tokens_give_no_estimate_of_the_divergence(world, tmp_path):
    for kind, known in (("topk", False), ("sampled", True)):
        signals = tmp_path / kind
        options = {"kind": kind, "top_k": 2} if kind == "topk" else {"kind": kind}
        capture(CaptureSettings(data=world.data, teacher=str(world.teacher), output=signals, **options))
        report = loop.train(settings(world, tmp_path / kind, signals=signals, max_steps=1))
        last = read_metrics(report.metrics)[-1]
        assert (last["kd"] > 0, last["kd_estimate"] is not None) == (True, known)


def test_a_loss_scale_that_is_too_large_leaves_the_update_out_and_halves(world, tmp_path):
    run = trial_run(settings(world, tmp_path, precision="float16"))
    run.parallel.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    metrics = loop.take_step(run)
    assert metrics["grad_norm"] is None
    assert math.isfinite(metrics["loss"])
    assert run.parallel.precision.scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_gradients_that_overflow_at_any_scale_stop_the_run(world, tmp_path):
    run = trial_run(settings(world, tmp_path, precision="float16"))
    run.parallel.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    run.model.head.bias_V.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingStopped, match="gradient norm inf: not finite because of rows"):
        loop.take_step(run)


# --- averaged weights


def test_the_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    average = WeightAverage(model, 0.4)
    for step, value in ((1, 4.0), (2, 2.0), (9, 0.0)):  # decays (1+s)/(10+s): 2/11, 3/12, then 0.4 at most
        model.weight.data.fill_(value)
        average.update(model, step)
        expected = {1: 4 + 4 * 2 / 11, 2: 2 + 0.25 * (2 + 4 * 2 / 11), 9: 0.4 * (2 + 0.25 * (2 + 4 * 2 / 11))}[step]
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-6)
    with contextlib.suppress(RuntimeError), average.in_place_of(model):
        assert model.weight.item() == pytest.approx(expected)
        raise RuntimeError("the weights come back whatever happens")
    assert model.weight.item() == 0.0


def test_the_average_is_evaluated_kept_and_used(world, tmp_path):
    report = loop.train(settings(world, tmp_path, ema_decay=0.3, max_steps=5, save_every=1, keep_last=9))
    plain = loop.train(settings(world, tmp_path / "plain", max_steps=5))
    checkpoint = load_checkpoint("", report.checkpoint)
    for name, weight in load_checkpoint("", plain.checkpoint).model.items():
        assert torch.equal(weight, checkpoint.model[name]), "averaging must not change what is trained"
    passed = [load_checkpoint("", tmp_path / "run" / f"checkpoint_v4_step_{step}.pt").model for step in (1, 2, 3, 4)]
    name, average = "embedding.weight", trial_run(settings(world, tmp_path)).model.embedding.weight.detach()
    for step, model in enumerate([*passed, checkpoint.model], start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * model[name]
    torch.testing.assert_close(checkpoint.average[name], average)
    dataset = trial_run(settings(world, tmp_path)).dataset
    found = {}
    for weights in ("auto", "ema", "last"):
        model, _ = load_model(report.checkpoint, torch.device("cpu"), weights)
        found[weights] = held_out_cross_entropy(model, dataset, torch.device("cpu"))
    assert found["auto"] == found["ema"] == report.held_out
    assert found["last"] == plain.held_out
    assert found["last"] != found["ema"]


def test_weights_that_are_not_there_are_refused(world, tmp_path, capsys):
    report = loop.train(settings(world, tmp_path, max_steps=1))
    capsys.readouterr()
    words = ["test", str(report.checkpoint), "--prompt", "the cat", "--weights", "ema"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "--weights: got ema; must be last or auto, because the checkpoint has no moving average" in error
    assert error.count("\n") == 1
    cli.app(
        ["eval", str(report.checkpoint), "--data", str(world.data), "--weights", "last"], result_action="return_value"
    )


# --- best and early stopping


def test_patience_by_hand():
    best = BestHeldOut()
    taken = [best.take(step, value, 2) for step, value in enumerate((5.0, 4.0, 4.0, 3.0, 3.5))]
    assert taken == [True, True, False, True, False]
    assert (best.cross_entropy, best.step, best.evaluations_since, best.stopped) == (3.0, 3, 1, False)
    assert not best.take(5, 3.0, 2)
    assert best.stopped
    endless = BestHeldOut()
    for step in range(50):
        endless.take(step, step, 0)
    assert (endless.evaluations_since, endless.stopped) == (49, False)


def test_a_run_stops_early_and_keeps_its_best(world, tmp_path, monkeypatch, capsys):
    script = iter([9.0, 7.0, 6.0, 6.5, 6.25, 1.0])  # steps 0, 2, 4, 6, 8
    monkeypatch.setattr(loop, "held_out_cross_entropy", lambda *_: {"all": next(script)})
    wanted = settings(
        world, tmp_path, epochs=9, evaluate_every=2, keep_best=True, patience=2, save_every=1, keep_last=99
    )
    assert trial_run(wanted).stage.steps_per_epoch > 8  # no epoch ends in between
    report = loop.train(wanted)
    assert report.steps == 8
    assert (
        "stopped early, 2 evaluations without a better held-out cross-entropy than 6.0000 at step 4"
        in capsys.readouterr().out
    )
    last, best = load_checkpoint("", report.checkpoint), load_checkpoint("", wanted.output / BEST_NAME)
    assert (last.step, last.finished, best.step, best.finished) == (8, True, 4, False)
    same = load_checkpoint("", wanted.output / "checkpoint_v4_step_4.pt")
    assert all(torch.equal(weight, same.model[name]) for name, weight in best.model.items())
    monkeypatch.undo()
    assert loop.train(wanted).steps == 8
    assert "This run is finished: 8 steps" in capsys.readouterr().out
    assert read_metrics(report.metrics)[-1]["step"] == 8


# --- optimisers


def test_muon_turns_the_layers_matrices_and_adamw_the_rest(world, tmp_path):
    # with wide phases no gradient has a rank of nearly half, whose other half Muon would leave short
    plain = {"phase_spread": 3.0, "weight_decay": 0, "warmup_fraction": 0, "table_rate": 50, "projector_rate": 0.4}
    plain["residual"] = False  # its start from bigrams leaves gradients of a lower rank
    plain["max_grad_norm"] = 1e6  # the two sum the norm in another order, which clipping would bring into each weight
    runs = [trial_run(settings(world, tmp_path, optimizer=name, muon_rate=rate, **plain))
            for name, rate in (("muon", 3.0), ("adamw", 1.0))]  # fmt: skip
    for run in runs:
        run.before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        loop.take_step(run)
    muon, adamw = runs
    groups = {group["name"]: group["lr"] for group in muon.optimizer.param_groups}
    assert groups == pytest.approx(
        {"table": 0.25, "projector": 2e-3, "projector biases": 2e-3, "others": 5e-3, "layers": 15e-3}
    )
    turned = 0
    for name, parameter in muon.model.named_parameters():
        other = adamw.model.get_parameter(name)
        if "layers" in name and parameter.ndim == 2:
            change = (muon.before[name] - parameter.detach()) / (15e-3 * 0.2 * math.sqrt(max(parameter.shape)))
            singular = torch.linalg.svdvals(change)
            assert 0.5 < singular.median() < 1.3, name
            # the change lies along U V^T of the first gradient
            u, _, v = torch.linalg.svd(parameter.grad, full_matrices=False)
            assert (change * (u @ v)).sum() / change.norm() / (u @ v).norm() > 0.9, name
            turned += 1
        else:
            assert torch.equal(parameter, other), name
    assert turned == 2 * 7


def test_muon_is_torchs_own_in_bfloat16(monkeypatch):
    monkeypatch.setattr(optimizers, "turning_format", lambda device: torch.bfloat16)
    torch.manual_seed(5)
    shapes, rates = ((7, 11), (13, 5), (3, 3)), {"lr": 0.02, "weight_decay": 0.3}
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.1)) for shape in shapes] for _ in range(2))
    muon = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **rates)
    bias = {"name": "others", "params": [torch.nn.Parameter(torch.zeros(3))], **rates}
    optimizer = optimizers.MuonAdamW([bias, {"name": "layers", "params": ours, **rates}])
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        muon.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(7, 31), (31, 7), (17, 17)])
def test_a_turned_matrix_has_its_singular_vectors_and_values_near_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = matrix.clone()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s /= s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert ((s > 0.65) & (s < 1.25)).all()
    torch.testing.assert_close(optimizers.orthogonal(matrix, torch.float64), u @ s.diag() @ v)
    torch.testing.assert_close(optimizers.orthogonal(matrix, torch.float32), (u @ s.diag() @ v).float())
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("units", "rounds", "expected"),
    [
        ({"amx_bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, False, torch.bfloat16),
        ({"avx2": True, "amx_bf16": False}, False, torch.float32),
        (None, True, torch.bfloat16),  # an old torch, which does not tell
        (None, False, torch.float32),
    ],
)
def test_bfloat16_is_used_where_there_are_units_for_it(monkeypatch, units, rounds, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    monkeypatch.setattr(onednn, "is_exact", lambda: not rounds)
    if units is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.delenv("INDRA_BFLOAT16")
    onednn._finds_16_bit_units.cache_clear()
    try:
        assert optimizers.turning_format("cpu") == expected
        monkeypatch.setenv("INDRA_BFLOAT16", "0" if expected is torch.bfloat16 else "1")
        assert optimizers.turning_format("cpu") != expected
        monkeypatch.setenv("INDRA_BFLOAT16", "yes")
        with pytest.raises(UserError, match="INDRA_BFLOAT16: got yes; must be 0 or 1"):
            optimizers.turning_format("cpu")
    finally:
        onednn._finds_16_bit_units.cache_clear()


def test_muon_state_goes_through_its_state_dict(world, tmp_path):
    wanted = settings(world, tmp_path, optimizer="muon")
    run, again = trial_run(wanted), trial_run(wanted)
    losses(run, 2)
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.step = run.step
    assert losses(run, 2) == losses(again, 2)
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in run.model.named_parameters())


def test_the_tables_decay_is_decoupled(world, tmp_path):
    tables = []
    for decay in (0.0, 0.5):
        run = trial_run(settings(world, tmp_path, table_weight_decay=decay, table_rate=50, warmup_fraction=0))
        start = run.model.embedding.weight.detach().clone()
        loop.take_step(run)
        tables.append(run.model.embedding.weight.detach())
    torch.testing.assert_close(tables[0] - tables[1], start * 0.5 * 0.25, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "adamw", "muon_rate": 2.0}, "--muon-rate: got 2.0; must be 1 without --optimizer muon"),
        (
            {"projector_rate": 2.0, "projector": "none", "heads": 1},
            "--projector-rate: got 2.0; must be 1 with --projector none",
        ),
        (
            {"projector_rate": 2.0, "projector": "frozen"},
            "--projector-rate: got 2.0; must be 1 with --projector frozen",
        ),
    ],
)
def test_rates_of_what_is_not_there_are_refused(world, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        loop.train(settings(world, tmp_path, **changes))
    assert not list((tmp_path / "run").glob("*.pt"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


# --- memory and speed of the layers


def test_gradient_checkpointing_gives_the_same_bits_from_less_memory(world, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    plain, kept = (trial_run(settings(world, tmp_path, gradient_checkpointing=on, dropout=0.1)) for on in (False, True))
    rows = np.arange(10)
    assert activation_bytes(kept, rows) < 0.3 * activation_bytes(plain, rows)
    assert losses(kept, 3) == losses(plain, 3)
    assert said == []
    assert all(torch.equal(p, kept.model.get_parameter(name)) for name, p in plain.model.named_parameters())


def test_without_a_compiler_there_is_one_line(world, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        UserError,
        match=r"--compile: got True; needs a working compiler, which is missing here \(InvalidCxx.*found\); leave",
    ):
        training_run.require_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_layers_give_the_same_loss(world, tmp_path):
    plain, compiled = (trial_run(settings(world, tmp_path, compile=on)) for on in (False, True))
    assert losses(compiled, 3) == pytest.approx(losses(plain, 3), rel=1e-5)
    assert set(compiled.model.state_dict()) == set(plain.model.state_dict())
    assert compiled.model.backbone.layers[0]._compiled_call_impl is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_run_that_was_stopped_goes_on_to_the_same_bits(world, tmp_path):
    options = {"compile": True, "epochs": 2, "batch_tokens": 1440, "save_every": 1, "keep_last": 99}
    whole, again = settings(world, tmp_path / "whole", **options), settings(world, tmp_path / "again", **options)
    report = loop.train(whole)
    step = whole.output / f"checkpoint_v4_step_{report.steps - 2}.pt"  # after an epoch's smaller last batch
    assert report.steps // 2 < report.steps - 2
    again.output.mkdir(parents=True)
    for path in (step, step.with_suffix(".json")):
        shutil.copy(path, again.output)
    torch._dynamo.reset()  # as in a new process
    found, expected = (load_checkpoint("", run.checkpoint) for run in (loop.train(again), report))
    assert all(torch.equal(weight, found.model[name]) for name, weight in expected.model.items())
