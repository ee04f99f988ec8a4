"""Training a teacher: what is optimised how, that it learns, and that it is a run like any other."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import survival
from indraquantum import cli
from indraquantum.config import TeacherSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.evaluation.held_out import held_out_cross_entropy, unigram_cross_entropy
from indraquantum.files import read_sums
from indraquantum.learner import to_tensors
from indraquantum.metrics import read_metrics
from indraquantum.model.attention import attend_as
from indraquantum.training import loop, pretrain_teacher
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.pretrain_teacher import (
    LlamaLearner,
    new_llama,
    parameter_groups,
    start_teacher,
    teacher_plan,
)
from indraquantum.training.resume import resume


def teacher_of(folder: Path, **changes) -> TeacherSettings:
    sizes = {"width": 12, "layers": 1, "heads": 2, "steps": 7, "batch_tokens": 1440, "micro_batch_tokens": 768}
    every = {"save_every": 2, "evaluate_every": 3, "device": "cpu", "threads": 1}
    return TeacherSettings(**{"output": folder / "teacher", "logs": folder / "logs", **sizes, **every, **changes})


def test_groups_cover_every_parameter_once_and_muon_gets_the_layers_matrices(world):
    settings = TeacherSettings(width=24, layers=2, heads=2, learning_rate=1e-3, table_rate=7, muon_rate=3)
    llama = new_llama(settings, open_dataset("--data", world.data))
    learner = LlamaLearner(llama)
    groups = {group["name"]: group for group in parameter_groups(learner, settings)}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in llama.parameters())
    assert groups["table"]["params"] == [llama.model.embed_tokens.weight]
    matrices = [p for layer in llama.model.layers for p in layer.parameters() if p.ndim == 2]
    assert {id(p) for p in groups["layers"]["params"]} == {id(p) for p in matrices}
    assert {name: (group["rate"], group["weight_decay"]) for name, group in groups.items()} == {
        "table": (7, 0.0), "layers": (3, 0.3), "others": (1.0, 0.0),
    }  # fmt: skip
    assert {group["lr"] for group in groups.values()} == {1e-3}


def test_eager_attention_keeps_documents_apart_as_torchs_does(world):
    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(new_llama(teacher_of(Path()), dataset)).eval()
    inputs = to_tensors(dataset.train.batch(np.arange(40)), torch.device("cpu"))
    assert (inputs["segment_ids_BT"].amax(1) > 0).any()  # a row with several documents
    fused = learner.hidden_states(**inputs, table_VD=None)
    attend_as(learner.backbone, "eager")
    torch.testing.assert_close(learner.hidden_states(**inputs, table_VD=None), fused, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", ["full", ".", "file"])
def test_what_is_no_teacher_is_not_replaced(world, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "full" / "run"
    run.mkdir(parents=True)
    for file in (run / "checkpoint.pt", run.parent / "config.json", run.parent / "model.safetensors"):
        file.write_text("kept")
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(pretrain_teacher, "HeldFolders", None)  # no step is taken
    with pytest.raises(UserError, match=r"--output: got \S+; must (not )?be"):
        pretrain_teacher.pretrain_teacher(teacher_of(tmp_path, data=world.data, output=Path(place), steps=1))
    assert (run / "checkpoint.pt").read_text() == (tmp_path / "file").read_text() == "kept"


def test_a_pickle_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"--data: got \S+pkl; must be the packed folder"):
        pretrain_teacher.pretrain_teacher(teacher_of(tmp_path, data=world.pickle, output=tmp_path / "new", steps=1))


def test_a_schedule_without_room_to_decay_is_refused(world, tmp_path):
    settings = teacher_of(tmp_path, data=world.data, schedule="wsd", warmup_fraction=0.9)
    with pytest.raises(
        UserError, match=r"--decay-fraction: got 0\.2; must be at most 1 with the warm-up fraction 0\.9"
    ):
        pretrain_teacher.pretrain_teacher(settings)


def test_transformers_shows_its_bars_again_when_the_teacher_is_saved(world, tmp_path):
    dataset = open_dataset("--data", world.data)
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        pretrain_teacher.save_teacher(LlamaLearner(new_llama(teacher_of(tmp_path), dataset)), dataset, tmp_path / "t")
        assert logging.is_progress_bar_enabled()
    finally:
        if not before:
            logging.disable_progress_bar()
    assert (tmp_path / "t" / "model.safetensors").is_file()


def test_a_full_disk_is_one_line_and_the_teacher_of_before_stays(world, tmp_path):
    folder, dataset = shutil.copytree(world.teacher, tmp_path / "teacher"), open_dataset("--data", world.data)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    learner = LlamaLearner(new_llama(teacher_of(tmp_path), dataset))

    def limited():
        survival.fill_disk()
        pretrain_teacher.save_teacher(learner, dataset, folder)

    assert survival.in_fork(limited, tmp_path / "said") == 2
    said = (tmp_path / "said").read_text()
    assert said == f"indra: error: {folder}: got File too large; must be on a writable disk with free space\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_teacher_of_before_is_replaced(world, tmp_path):
    shutil.copytree(world.teacher, tmp_path / "teacher")
    pretrain_teacher.pretrain_teacher(teacher_of(tmp_path, data=world.data, steps=1, width=8))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").config.hidden_size == 8


def test_a_teacher_has_learned(world):
    """The shared one, after 40 steps, is far below what the tokens' frequencies give."""
    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(AutoModelForCausalLM.from_pretrained(world.teacher).eval())
    learned = held_out_cross_entropy(learner, dataset, torch.device("cpu"))
    assert learned["all"] < 0.5 * unigram_cross_entropy(dataset)["all"]


def outcome(settings: TeacherSettings) -> tuple[dict[str, str], list[dict]]:
    """What two runs must have in common to the bit: the teacher's files, and every metrics line."""
    lines = read_metrics(settings.logs / "teacher" / "metrics.jsonl")
    return read_sums(settings.output), [{**line, "tokens_per_second": None} for line in lines]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run that nothing stopped."""
    settings = teacher_of(tmp_path_factory.mktemp("finished"), data=world.data)
    assert survival.in_fork(lambda: pretrain_teacher.pretrain_teacher(settings)) == 0
    return settings


def test_a_teacher_is_logged_evaluated_and_listed_as_any_run(finished, capsys):
    sums, lines = outcome(finished)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sums.keys()
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["step"] for line in lines if line["held_out"]] == [0, 3, 6, 7]
    assert all(line["loss"] == line["ce"] > 0 for line in lines[1:])
    assert lines[-1]["held_out"]["all"] < lines[0]["held_out"]["all"]
    with pytest.raises(SystemExit):
        cli.main(["runs", f"--logs={finished.logs}"])
    assert re.search(r"^teacher\tteacher\tfinished\t7/7", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_teacher_resumes_to_the_same_bits(world, tmp_path, finished, how):
    settings, said = teacher_of(tmp_path, data=world.data), tmp_path / "said"

    def stopped():
        survival.at(loop, "take_step", "after", 5, lambda: os.kill(os.getpid(), how))
        pretrain_teacher.pretrain_teacher(settings)

    status = survival.in_fork(stopped, said)
    assert status == (-how if how == signal.SIGKILL else 128 + how)
    assert not settings.output.exists()
    assert survival.in_fork(lambda: pretrain_teacher.pretrain_teacher(settings), said) == 0
    assert f"Resuming from step {4 if how == signal.SIGKILL else 5} of 7." in said.read_text()
    assert outcome(settings) == outcome(finished)


def test_a_sampled_teacher_in_16_bits_resumes_to_the_same_bits(world, tmp_path, monkeypatch, capsys):
    quick = {"data": world.data, "softmax": "sampled", "precision": "bfloat16", "steps": 4}
    whole, halved = (teacher_of(tmp_path / name, **quick) for name in ("whole", "halved"))

    def stopped():
        survival.at(loop, "take_step", "after", 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        pretrain_teacher.pretrain_teacher(halved)

    assert survival.in_fork(lambda: pretrain_teacher.pretrain_teacher(whole)) == 0
    assert survival.in_fork(stopped) == -signal.SIGKILL
    said = tmp_path / "said"
    assert survival.in_fork(lambda: pretrain_teacher.pretrain_teacher(halved), said) == 0
    assert "Resuming from step 2 of 4." in said.read_text()
    assert outcome(halved) == outcome(whole)
    identity = load_checkpoint("", max(pretrain_teacher.run_folder(halved).glob("*.pt"))).settings
    assert (identity["softmax"], identity["precision"], identity["objective_precision"]) == (
        "sampled", "bfloat16", "bfloat16",
    )  # fmt: skip


def test_a_teacher_of_before_resumes_in_float32_with_the_exact_softmax(world, tmp_path):
    begun = teacher_of(tmp_path, data=world.data, precision="float32", softmax="exact", steps=3, save_every=1)
    pretrain_teacher.pretrain_teacher(begun)
    path = max(pretrain_teacher.run_folder(begun).glob("*.pt"))
    checkpoint = load_checkpoint("", path)
    for name in ("precision", "objective_precision", "attention_precision", "softmax"):
        del checkpoint.settings[name]
    save_checkpoint(path, checkpoint)
    settings = teacher_of(tmp_path, data=world.data, steps=3, save_every=1)
    dataset = open_dataset("--data", world.data)
    run = start_teacher(settings, teacher_plan(settings, dataset), torch.device("cpu"))
    assert resume(run)
    assert run.parallel.precision.name == run.parallel.precision.name_of_objective == "float32"
    assert run.engine.sampler is None
    assert run.model.config._attn_implementation == "sdpa"


def test_a_teacher_stopped_in_its_last_evaluation_is_finished_by_one_more_command(world, tmp_path, finished):
    settings, said = teacher_of(tmp_path, data=world.data), tmp_path / "said"

    def stopped():
        survival.at(loop, "held_out_cross_entropy", "after", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        pretrain_teacher.pretrain_teacher(settings)

    assert survival.in_fork(stopped) == 128 + signal.SIGTERM
    for is_finished in (False, True):
        assert survival.in_fork(lambda: pretrain_teacher.pretrain_teacher(settings), said) == 0
        assert ("This run is finished" in said.read_text()) is is_finished
    assert outcome(settings) == outcome(finished)


def test_a_finished_teacher_is_not_trained_again_and_may_be_extended_where_its_schedule_allows(
    world, tmp_path, finished, capsys
):
    again = finished.model_copy(update={"output": tmp_path / "teacher", "logs": tmp_path / "logs"})
    shutil.copytree(pretrain_teacher.run_folder(finished), pretrain_teacher.run_folder(again))
    with pytest.raises(UserError, match=r"--width: got 16; must be 12, as in the run that \S+teacher_run holds, or"):
        pretrain_teacher.pretrain_teacher(again.model_copy(update={"width": 16}))
    with pytest.raises(UserError, match=r"--steps: got 9; must be 7, .*its cosine schedule is tied to its length$"):
        pretrain_teacher.pretrain_teacher(again.model_copy(update={"steps": 9}))
    with pytest.raises(UserError, match=r"--logs: got \S+; must not put the metrics into the teacher's folder"):
        pretrain_teacher.pretrain_teacher(again.model_copy(update={"logs": tmp_path}))
    pretrain_teacher.pretrain_teacher(again)
    assert "This run is finished: 7 steps" in capsys.readouterr().out
    assert read_sums(again.output) == read_sums(finished.output)
    constant = teacher_of(tmp_path / "constant", data=world.data, schedule="constant", steps=3)
    pretrain_teacher.pretrain_teacher(constant)
    assert pretrain_teacher.pretrain_teacher(constant.model_copy(update={"steps": 5})).tokens > 4 * 1000


def test_a_teachers_checkpoint_is_no_students(world, tmp_path, finished, capsys):
    checkpoint = max(pretrain_teacher.run_folder(finished).glob("*.pt"))
    small = [f"--data={world.data}", f"--logs={tmp_path}", "--d-model=4", "--layers=1", "--heads=2", "--mlp-width=6"]
    for words in (
        ["test", str(checkpoint), "--prompt=x"],
        ["train", *small, f"--start-from={checkpoint}", f"--output={tmp_path / 'run'}"],
        ["train", *small, f"--output={pretrain_teacher.run_folder(finished)}"],
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        error = capsys.readouterr().err
        assert (exit_.value.code, error.count("\n")) == (2, 1)
        assert "must be a checkpoint of indraquantum, not of llama" in error
