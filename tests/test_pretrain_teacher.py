"""Training a teacher: what is optimised how, and that it learns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from indraquantum.config import TeacherSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.evaluation.held_out import held_out_cross_entropy, unigram_cross_entropy
from indraquantum.training import pretrain_teacher
from indraquantum.training.pretrain_teacher import LlamaLearner, new_llama, parameter_groups


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


@pytest.mark.parametrize("place", ["full", ".", "file"])
def test_what_is_no_teacher_is_not_replaced(world, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "full" / "run"
    run.mkdir(parents=True)
    for file in (run / "checkpoint.pt", run.parent / "config.json", run.parent / "model.safetensors"):
        file.write_text("kept")
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(pretrain_teacher, "Engine", None)  # no step is taken
    with pytest.raises(UserError, match=r"--output: got \S+; must (not )?be"):
        pretrain_teacher.pretrain_teacher(TeacherSettings(data=world.data, output=Path(place), steps=1))
    assert (run / "checkpoint.pt").read_text() == (tmp_path / "file").read_text() == "kept"


def test_a_pickle_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"--data: got \S+pkl; must be the packed folder"):
        pretrain_teacher.pretrain_teacher(TeacherSettings(data=world.pickle, output=tmp_path / "new", steps=1))


def test_a_schedule_without_room_to_decay_is_refused(world, tmp_path):
    settings = TeacherSettings(data=world.data, output=tmp_path / "new", schedule="wsd", warmup_fraction=0.9)
    with pytest.raises(
        UserError, match=r"--decay-fraction: got 0\.2; must be at most 1 with the warm-up fraction 0\.9"
    ):
        pretrain_teacher.pretrain_teacher(settings)


def test_a_teacher_of_before_is_replaced(world, tmp_path):
    shutil.copytree(world.teacher, tmp_path / "teacher")
    settings = TeacherSettings(data=world.data, output=tmp_path / "teacher", steps=1, width=8, layers=1, heads=2)
    pretrain_teacher.pretrain_teacher(settings)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").config.hidden_size == 8


def test_a_teacher_has_learned(world):
    """The shared one, after 40 steps, is far below what the tokens' frequencies give."""
    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(AutoModelForCausalLM.from_pretrained(world.teacher).eval())
    learned = held_out_cross_entropy(learner, dataset, torch.device("cpu"))
    assert learned["all"] < 0.5 * unigram_cross_entropy(dataset)["all"]
