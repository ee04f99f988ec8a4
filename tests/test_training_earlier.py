"""Runs that an earlier version began resume with the command that began them, although defaults have changed."""

from __future__ import annotations

import pytest

from indraquantum.config import TrainSettings
from indraquantum.errors import UserError
from indraquantum.training import earlier, loop
from indraquantum.training.checkpoint import load_checkpoint
from indraquantum.trials.dry_run import dry_run

FORMER = {"d_model": 128, "state_width": 128, "mlp_width": 688, "residual": False}


def settings(world, folder, **changes) -> TrainSettings:
    return TrainSettings(
        data=world.data, output=folder / "run", logs=folder / "logs", threads=1, layers=1, batch_tokens=480,
        no_teacher=True, max_steps=2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def former(world, tmp_path_factory):
    """A run with the shape that was the default, and its folder."""
    folder = tmp_path_factory.mktemp("former")
    return folder, loop.train(settings(world, folder, **FORMER))


def test_a_run_with_the_former_shape_resumes_without_its_options(world, former, capsys):
    folder, report = former
    before = report.checkpoint.read_bytes()
    assert loop.train(settings(world, folder)).steps == 2
    assert "This run is finished" in capsys.readouterr().out
    assert report.checkpoint.read_bytes() == before
    found = dry_run(settings(world, folder)).parameters["all"]
    assert found == sum(tensor.numel() for tensor in load_checkpoint("", report.checkpoint).model.values())


@pytest.mark.parametrize(
    ("option", "given", "then"),
    [("d-model", 256, 128), ("state-width", 96, 128), ("mlp-width", 512, 688), ("residual", True, False)],
)
def test_what_is_given_must_be_as_in_the_run(world, former, option, given, then):
    folder, _ = former
    changes = {option.replace("-", "_"): given}
    if option == "residual":
        changes["residual_head"] = "same"
    with pytest.raises(UserError, match=f"--{option}: got {given}; must be {then}, as in the run that"):
        loop.train(settings(world, folder, **changes))


def test_states_without_a_width_of_their_own_were_as_wide_as_the_table(world, tmp_path, monkeypatch):
    before = {"projector": "quantum", "d_model": 40, "state_width": None, "mlp_width": 688}
    monkeypatch.setattr(earlier, "settings_of_checkpoint", lambda settings: before)
    kept = earlier.with_former_shape(settings(world, tmp_path, d_model=40))
    assert (kept.d_model, kept.state_width, kept.mlp_width, kept.residual) == (40, 40, 688, False)
    before |= {"projector": "none", "residual": False, "residual_head": "turned"}
    plain = earlier.with_former_shape(settings(world, tmp_path, d_model=40, projector="none", residual_head="turned"))
    assert (plain.d_model, plain.state_width, plain.residual_head) == (40, None, "turned")


def test_a_shape_that_was_never_a_default_is_not_taken_over(world, tmp_path):
    loop.train(settings(world, tmp_path, d_model=12, mlp_width=10))
    with pytest.raises(UserError, match="--d-model: got 256; must be 12, as in the run that"):
        loop.train(settings(world, tmp_path))
