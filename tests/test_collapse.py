"""Each kind of collapse is found within 50 steps of a run that was made to collapse so, and none in healthy runs."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import survival
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import TrainingStopped
from indraquantum.evaluation.collapse import collapse_figures, context_divergence, effective_rank
from indraquantum.metrics import read_metrics
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.teacher.signals import SignalStore
from indraquantum.training import guards, loop
from indraquantum.training.guards import LOOKS, CollapseFigures, CollapseGuard

HEALTHY_STEPS = 40  # before a run is made to collapse
WIDE = {"magnitude": "softplus", "phase_spread": 3.0, "ends": "shared", "table_rate": 10, "projector_rate": 1.0}
LONG = {"d_model": 14, "state_width": 14, "mlp_width": 22, "epochs": 16, "evaluate_every": 1000, "on_collapse": "stop"}


@pytest.fixture(scope="module")
def healthy(world, tmp_path_factory):
    """A healthy run's checkpoint at HEALTHY_STEPS; with wide phases all parts are in use by then."""
    folder = tmp_path_factory.mktemp("healthy")
    settings = survival.small_run(world, folder, **LONG, **WIDE, save_every=HEALTHY_STEPS)

    class Enough(Exception):
        pass

    def stop_here(run, original=loop.take_step):
        if run.step == HEALTHY_STEPS:
            raise Enough
        return original(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stop_here)
        with pytest.raises(Enough):
            survival.train_small(settings)
    return settings


def going_on(healthy, world, folder):
    """Return the settings of a run in `folder` that resumes from the healthy run's checkpoint."""
    settings = survival.small_run(world, folder, **LONG, **WIDE, save_every=1000)
    shutil.copytree(healthy.output, settings.output)
    shutil.copytree(healthy.logs, settings.logs)
    return settings


def strike_when_resumed(monkeypatch, strike):
    """Call `strike(run)` once a run has its checkpoint."""
    resume = loop.resume

    def broken(run):
        resumed = resume(run)
        strike(run)
        return resumed

    monkeypatch.setattr(loop, "resume", broken)


def fixed_at(parameter: torch.nn.Parameter, value) -> None:
    """Set a weight, and keep it from learning."""
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value).expand_as(parameter))
    parameter.requires_grad_(False)
    parameter.grad = None


def only_frequent_tokens(run, _):
    fixed_at(run.model.backbone.norm.weight, 0.0)


def no_phases(run, _):
    fixed_at(run.model.projector.phase.weight, 0.0)
    fixed_at(run.model.projector.phase.bias, 0.0)


def no_magnitudes(run, _):
    fixed_at(run.model.projector.magnitude.weight, 0.0)


def one_direction(run, _):
    with torch.no_grad():
        row_d = run.model.embedding.weight[:1].clone()
    fixed_at(run.model.embedding.weight, row_d)


def a_blind_readout(run, _):
    for parameter in run.model.readout.parameters():
        fixed_at(parameter, 0.0)


def empty_signals(run, patch):
    batch = SignalStore.batch

    def emptied(self, split, index_N):
        found = batch(self, split, index_N)
        found.ids_NK.fill_(-1)
        return found

    patch.setattr(SignalStore, "batch", emptied)


@pytest.mark.parametrize(
    ("collapse", "kinds"),
    [
        (only_frequent_tokens, {"context_divergence"}),
        (no_phases, {"phase_rise"}),
        (no_magnitudes, {"magnitude_rise"}),
        (one_direction, {"effective_rank"}),
        (a_blind_readout, {"dead_phase", "dead_magnitude"}),
        (empty_signals, {"dead_kd", "dead_phase", "dead_magnitude"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_collapse_is_found_within_50_steps(world, healthy, tmp_path, monkeypatch, collapse, kinds):
    settings = going_on(healthy, world, tmp_path)
    strike_when_resumed(monkeypatch, lambda run: collapse(run, monkeypatch))
    with pytest.raises(TrainingStopped) as error:
        survival.train_small(settings)
    step, found = re.match(r"step (\d+): collapse \((.*?)\)", str(error.value)).groups()
    last = read_metrics(settings.logs / "run" / "metrics.jsonl")[-1]  # "see these figures in the metrics"
    assert (last["step"], set(found.split(", ")) <= set(last["collapse"])) == (int(step), True)
    assert HEALTHY_STEPS < int(step) <= HEALTHY_STEPS + 50
    assert kinds <= set(found.split(", "))
    if kinds == {"magnitude_rise"} or "dead_phase" in kinds:
        assert set(found.split(", ")) == kinds  # and nothing else is blamed; without phases the rank falls too


@pytest.mark.parametrize("looks", [LOOKS, LOOKS + 3])
def test_a_collapse_that_was_confirmed_before_stops_the_run_that_goes_on(healthy, world, tmp_path, monkeypatch, looks):
    """Left within the look that confirmed it, or under --on-collapse warn."""
    settings = going_on(healthy, world, tmp_path)

    def confirmed(run):
        no_phases(run, monkeypatch)
        run.guard.found = {"phase_rise": looks}

    strike_when_resumed(monkeypatch, confirmed)
    with pytest.raises(TrainingStopped, match=rf"step {HEALTHY_STEPS + loop.PROBE_EVERY}: collapse \(.*phase_rise"):
        survival.train_small(settings)


def test_a_look_at_what_is_not_finite_stops_the_run(healthy, world, tmp_path, monkeypatch):
    settings = going_on(healthy, world, tmp_path)

    def spoilt(run, original=loop.take_step):
        metrics = original(run)
        if run.step % loop.PROBE_EVERY == 0:
            with torch.no_grad():
                run.model.head.bias_V[0] = torch.nan
        return metrics

    monkeypatch.setattr(loop, "take_step", spoilt)
    with pytest.raises(TrainingStopped, match=r"step 60: predictions on held-out rows are not finite"):
        survival.train_small(settings)


def test_a_look_takes_a_single_row_if_rows_are_long(monkeypatch):
    looked = []

    def figures(_, rows):
        looked.append(rows.tolist())
        return CollapseFigures(*[None] * len(CollapseFigures._fields))

    monkeypatch.setattr(guards, "collapse_figures", figures)
    for row_length in (48, 3000, 32_768):
        split = SimpleNamespace(num_rows=9, row_length=row_length, batch=lambda rows: rows)
        guards.probe(CollapseGuard(), torch.nn.Identity(), None, split, split, None)
    assert looked == [[0, 1, 2, 3], [0, 1], [0]]


@pytest.mark.parametrize(
    ("options", "rise"),
    [({}, 0.002), ({"residual": False}, 0.1), (WIDE, 1)],
    ids=["residual", "small", "wide"],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_healthy_runs_are_left_alone(world, tmp_path, seed, options, rise):
    settings = survival.small_run(world, tmp_path, **LONG, **options, seed=seed, save_every=1000)
    survival.train_small(settings)
    lines = [line for line in read_metrics(settings.logs / "run" / "metrics.jsonl") if line["effective_rank"]]
    assert len(lines) >= 4
    assert all(line["collapse"] is None for line in lines)
    assert lines[-1]["context_divergence"] > 1
    assert lines[-1]["phase_rise"] > rise


@pytest.mark.parametrize(
    ("ends", "state_width", "residual"),
    [("shared", None, "none"), ("separate", None, "none"), ("separate", 12, "none"), ("separate", 12, "turned")],
)
def test_the_rises_against_a_model_whose_weights_are_changed(world, ends, state_width, residual):
    """Phases are 0 where the phase layers are; magnitudes the mean where their layers give its constant."""
    dataset = open_dataset("--data", world.data)
    torch.manual_seed(0)
    sizes = {"vocab_size": dataset.tokenizer.vocabulary_size, "d_model": 16, "num_hidden_layers": 1}
    sizes["state_width"] = state_width
    if residual == "turned":
        sizes |= {"residual": True, "residual_head": "turned"}
    model = IndraQuantumPhase2(IndraQuantumConfig(**sizes, ends=ends, phase_spread=1.0, table_std=3.0)).eval()
    batch = dataset.validation.batch(np.arange(3))
    ids, positions, segments = (torch.from_numpy(part) for part in (batch.input_ids, batch.positions, batch.segments))
    labels = torch.from_numpy(batch.labels[batch.labels >= 0])
    every = math.ceil(len(labels) / 128)

    @torch.no_grad()
    def loss_without(part=None):
        changed = copy.deepcopy(model)
        for projector in {changed.projector, changed.input_projector} - {None} if part else ():
            layer = getattr(projector, part)
            mean_d = layer(changed.embedding.weight).mean(dim=0)
            fixed_at(layer.weight, 0.0)
            fixed_at(layer.bias, mean_d if part == "magnitude" else 0.0)
        logits = changed(ids, position_ids=positions, segment_ids=segments).logits[torch.from_numpy(batch.labels) >= 0]
        return torch.nn.functional.cross_entropy(logits[::every], labels[::every]).item()

    figures = collapse_figures(model, batch)
    assert figures.phase_rise == pytest.approx(loss_without("phase") - loss_without(), abs=1e-5)
    assert figures.magnitude_rise == pytest.approx(loss_without("magnitude") - loss_without(), abs=1e-5)
    assert abs(figures.phase_rise) > 0.01
    assert abs(figures.magnitude_rise) > 0.01


def test_a_direction_that_all_tokens_share_is_no_collapse(world):
    """At V = 32,000 rare tokens drift alike; no prediction changes by it."""
    dataset = open_dataset("--data", world.data)
    vocabulary = dataset.tokenizer.vocabulary_size
    model = IndraQuantumPhase2(
        IndraQuantumConfig(vocab_size=vocabulary, d_model=16, num_hidden_layers=1, projector="none")
    )
    batch = dataset.validation.batch(np.arange(3))
    before = collapse_figures(model, batch).effective_rank
    read = model.embedding.weight[np.unique(batch.input_ids)]
    assert before == pytest.approx(effective_rank(read - read.mean(dim=0)))
    with torch.no_grad():
        model.embedding.weight += 100.0
    assert effective_rank(model.embedding.weight) < 1.1
    assert collapse_figures(model, batch).effective_rank == pytest.approx(before, rel=1e-3)


def test_a_resumed_guard_knows_what_it_has_seen(healthy):
    held = torch.load(max(healthy.output.glob("*_step_*.pt")), weights_only=True)["guard"]
    guard = CollapseGuard(**json.loads(json.dumps(held)))
    assert guard.best["phase_rise"] > 1
    gone = CollapseFigures(context_divergence=1.0, phase_rise=0.0, magnitude_rise=0.5, effective_rank=12.0)
    assert [guard.look(gone, []) for _ in range(LOOKS + 1)] == [[], ["phase_rise"], []]


def test_the_figures_against_closed_forms():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0]))) == pytest.approx(5 / 4 ** (4 / 5))
    assert effective_rank(torch.zeros(3, 2)) == 0
    assert context_divergence(torch.randn(1, 11).expand(13, 11)) == pytest.approx(0, abs=1e-6)
    assert context_divergence(1e3 * torch.eye(5)) == pytest.approx(math.log(5))
