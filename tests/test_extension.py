"""A finished run gets more steps. It ends in the bits of the long run, or an error says what else you can do."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import survival
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.metrics import read_metrics
from indraquantum.training import loop
from indraquantum.training.checkpoint import load_checkpoint

# Nothing depends on the progress, so the first steps of a short and of a long run are the same.
PLAIN = {"no_teacher": True, "warmup_fraction": 0.0, "ema_decay": 0.9}


def steps_per_epoch(world) -> int:
    return -(-open_dataset("--data", world.data).train.num_rows // (survival.SMALL["batch_tokens"] // 48))


def trained(world, folder, **options):
    settings = survival.small_run(world, folder, **options)
    loop.train(settings)
    return settings


def lines_of(settings) -> list[dict]:
    return [line | {"tokens_per_second": None} for line in read_metrics(settings.logs / "run" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def long_run(world, tmp_path_factory):
    """Three epochs at a constant rate, never interrupted."""
    return trained(world, tmp_path_factory.mktemp("long"), **PLAIN, schedule="constant", epochs=3)


def test_more_epochs_at_a_constant_rate_are_the_long_run_to_the_bit(world, long_run, tmp_path):
    trained(world, tmp_path, **PLAIN, schedule="constant", epochs=1)
    extended = trained(world, tmp_path, **PLAIN, schedule="constant", epochs=3)
    assert survival.result(extended) == survival.result(long_run)
    record = json.loads((extended.logs / "run" / "run.json").read_text())
    assert (record["planned_steps"], record["total_steps"]) == (steps_per_epoch(world), 3 * steps_per_epoch(world))


def test_a_run_may_be_extended_inside_an_epoch_and_killed_after_that(world, long_run, tmp_path):
    """The end of the short run bears the name of an epoch that ends later; step checkpoints come between the two."""
    options = PLAIN | {"schedule": "constant", "epochs": 3}
    steps = steps_per_epoch(world)
    trained(world, tmp_path, **options, max_steps=steps + 1)
    settings = survival.small_run(world, tmp_path, **options)

    def killed():
        survival.at(loop, "take_step", "after", 4, survival.die)  # behind the checkpoint of step `steps` + 3 or + 4
        survival.train_small(settings)

    assert survival.in_fork(killed) == -9
    said = tmp_path / "said"
    assert survival.in_fork(lambda: survival.train_small(settings), said) == 0
    assert re.search(rf"Resuming from step ({steps + 3}|{steps + 4}) of", said.read_text())
    assert survival.result(settings)[0] == survival.result(long_run)[0]


def test_warm_up_and_weights_keep_to_the_length_that_the_run_was_begun_with(world, tmp_path, capsys):
    options = {"schedule": "constant", "warmup_fraction": 0.5}
    steps = steps_per_epoch(world)
    short = trained(world, tmp_path, **options, epochs=1)
    before = lines_of(short)
    capsys.readouterr()
    extended = trained(world, tmp_path, **options, epochs=3)
    out = capsys.readouterr().out
    assert f"The run began with {steps} steps. Its warm-up and loss weights keep that length." in out
    lines = lines_of(extended)
    assert lines[: steps + 1] == before
    assert {line["learning_rate"] for line in lines[steps + 1 :]} == {extended.learning_rate}
    assert [line["kd_weight"] for line in lines[steps + 1 :]] == pytest.approx([0.05] * 2 * steps)
    checkpoint = load_checkpoint("", extended.output / "checkpoint_v4_epoch_3.pt")
    assert checkpoint.optimizer["state"][0]["step"] == 3 * steps  # AdamW's own count
    loop.train(extended)
    assert "This run is finished" in capsys.readouterr().out
    assert lines_of(extended) == lines


def test_wsd_goes_on_from_before_its_decay(world, tmp_path):
    options = PLAIN | {"schedule": "wsd", "decay_fraction": 0.4, "keep_last": 1, "save_every": 1}
    long = trained(world, tmp_path / "long", **options, epochs=3)
    trained(world, tmp_path, **options, epochs=1)
    begin = steps_per_epoch(world) - round(0.4 * steps_per_epoch(world))
    way = tmp_path / "run" / f"checkpoint_v4_step_{begin}.pt"  # kept, however few are to be
    wanted = survival.small_run(world, tmp_path, **options, epochs=3)
    with pytest.raises(UserError) as refused:
        loop.train(wanted)
    assert str(refused.value) == (
        f"--epochs: got 3; must be 1, as in the run that {wanted.output} holds: its learning rate decays from step "
        f"{begin} on. To train it further, resume from before that with --resume {way}, or begin a new run from its "
        f"weights with --start-from {wanted.output / 'checkpoint_v4_epoch_1.pt'} --output NEW"
    )
    loop.train(wanted.model_copy(update={"resume": str(way)}))
    assert survival.result(wanted) == survival.result(long)


@pytest.mark.parametrize(
    ("options", "longer", "said"),
    [
        ({}, {"epochs": 3}, "--epochs: got 3; must be 2, .*: its cosine schedule is tied to its length"),
        ({"max_steps": 2}, {"max_steps": 3}, "--max-steps: got 3; must be 2, .*: its cosine schedule is tied"),
        ({"schedule": "constant"}, {"epochs": 1}, r"--epochs: got 1; must be 2, .*: it has done \d+ steps already"),
        (
            {"strategy": "stage2-v3-gentle", "schedule": "constant", "epochs": 4, "no_teacher": True},
            {"epochs": 5},
            "--epochs: got 5; must be 4, .*: its stage stage1 is over",
        ),
        ({}, {"epochs": 3, "dropout": 0.0}, "--dropout: got 0.0; must be 0.1"),
    ],
    ids=["cosine", "cosine-steps", "shorter", "stage", "another-option"],
)
def test_where_it_cannot_be_the_message_names_the_way(world, tmp_path, options, longer, said):
    short = trained(world, tmp_path, **options)
    before = {path.name: path.read_bytes() for path in short.output.iterdir()}
    with pytest.raises(UserError, match=rf"^{said}") as refused:
        loop.train(survival.small_run(world, tmp_path, **options | longer))
    assert {path.name: path.read_bytes() for path in short.output.iterdir()} == before
    if "dropout" not in longer:
        (start,) = re.findall(r"with --start-from (\S+) --output NEW", str(refused.value))
        load_checkpoint("", max(short.output.glob(start.rpartition("/")[2])))


def test_going_back_to_a_shorter_length_leaves_nothing_that_is_ahead_of_the_metrics(world, tmp_path):
    options = PLAIN | {"schedule": "constant"}
    short = trained(world, tmp_path, **options, epochs=1)
    before = lines_of(short)
    long = trained(world, tmp_path, **options, epochs=2)
    lines = lines_of(long)
    with pytest.raises(UserError, match=f"it has done {2 * steps_per_epoch(world)} steps already"):
        loop.train(short)
    loop.train(short.model_copy(update={"resume": str(short.output / "checkpoint_v4_epoch_1.pt")}))
    assert lines_of(short) == before
    assert [path.name for path in short.output.glob("*.pt")] == ["checkpoint_v4_epoch_1.pt"]
    loop.train(long)
    assert lines_of(long) == lines


def test_a_run_that_stopped_early_says_so_when_it_is_given_more_steps(world, tmp_path, capsys):
    options = PLAIN | {"schedule": "constant", "learning_rate": 0.9, "patience": 1}
    trained(world, tmp_path, **options, epochs=2)
    capsys.readouterr()
    longer = trained(world, tmp_path, **options, epochs=4)
    last = longer.output / "checkpoint_v4_epoch_1.pt"
    said = f"--patience stopped this run early. To train it further, use --start-from {last} --output NEW\n"
    assert said in capsys.readouterr().out


def test_the_way_that_is_named_trains_on(world, tmp_path):
    short = trained(world, tmp_path, epochs=1)
    last = short.output / "checkpoint_v4_epoch_1.pt"
    shutil.rmtree(short.logs)
    new = short.model_copy(update={"output": tmp_path / "new", "start_from": last, "max_steps": 1})
    loop.train(new)
    assert load_checkpoint("", new.output / "checkpoint_v4_epoch_1.pt").step == 1
