"""Training a teacher: what is optimised how, and that it learns."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from indraquantum.config import TeacherSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.evaluation.held_out import held_out_cross_entropy, unigram_cross_entropy
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


def test_a_teacher_has_learned(world):
    """The shared one, after 40 steps, is far below what the tokens' frequencies give."""
    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(AutoModelForCausalLM.from_pretrained(world.teacher).eval())
    learned = held_out_cross_entropy(learner, dataset, torch.device("cpu"))
    assert learned["all"] < 0.5 * unigram_cross_entropy(dataset)["all"]
