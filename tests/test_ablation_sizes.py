"""The size and the work of a variant, before it is trained: FLOPs by hand, and tokens against the batches of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from indraquantum.ablation.sizes import flops_per_token, planned_tokens
from indraquantum.config import TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.training.plan import plan_run

D, C, V, LENGTH, BATCH = 7, 6, 320, 48, 480
PROJECTOR = 2 * D * C  # weights of magnitude and phase


def flops(**options) -> float:
    settings = TrainSettings(d_model=D, state_width=C, layers=1, heads=1, mlp_width=10, **options)
    with torch.device("meta"):
        return flops_per_token(IndraQuantumPhase2(IndraQuantumConfig.from_settings(settings, V, 1, 2)), LENGTH, BATCH)


def test_borns_rule_takes_the_heads_product_twice():
    assert flops(head="born") - flops() == 6 * V * 2 * C == 23_040


@pytest.mark.parametrize(("ends", "inputs"), [("separate", 1), ("shared", 0)])
def test_a_frozen_projector_needs_no_gradients(ends, inputs):
    """A third of its work is left out. It lifts 320 tokens in a step of 480 positions, and perhaps each input."""
    saved = flops(projector="quantum", ends=ends) - flops(projector="frozen", ends=ends)
    assert saved == pytest.approx(2 * PROJECTOR * (V / BATCH + inputs))
    assert saved == pytest.approx({"separate": 280, "shared": 112}[ends])


def test_the_tokens_of_several_stages_are_those_of_their_batches(world):
    """Both stages end within an epoch."""
    data = open_dataset("--data", world.data)
    settings = TrainSettings(strategy="stage2-v3-gentle", epochs=5, max_steps=44, batch_tokens=BATCH)
    plan = plan_run(settings, data)
    assert len(plan.stages) == 2
    assert all(stage.steps > stage.steps_per_epoch for stage in plan.stages)
    assert all(stage.steps % stage.steps_per_epoch for stage in plan.stages)
    steps = [plan.step(number) for number in range(plan.total_steps)]
    seen = sum(int((step.split.batch(step.rows).index >= 0).sum()) for step in steps)
    assert planned_tokens(settings, data) == seen


def test_the_options_of_equal_work_cost_what_a_plain_transformer_costs():
    path = Path(__file__).parents[1] / "configs" / "options" / "equal-work.yaml"
    narrow = TrainSettings(**yaml.safe_load(path.read_text()))
    plain = TrainSettings(projector="none", d_model=180, heads=3, mlp_width=506)
    with torch.device("meta"):
        ours, theirs = (IndraQuantumPhase2(IndraQuantumConfig.from_settings(s, 32_000, 1, 2)) for s in (narrow, plain))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert flops_per_token(ours, 128, 2048) == pytest.approx(flops_per_token(theirs, 128, 2048), rel=0.01)
