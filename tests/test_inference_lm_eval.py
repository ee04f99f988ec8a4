"""lm-evaluation-harness on a checkpoint: a local task, with plain log-probabilities as the reference."""

from __future__ import annotations

import json
import math

import pytest
import torch

from indraquantum.config import TrainSettings
from indraquantum.inference.load import load_model
from indraquantum.training.loop import train

pytest.importorskip("lm_eval", reason="lm_eval is an extra")

QUESTIONS = [
    {"text": "the cat sees", "choices": ["a dog at night", "my of of zebra"], "answer": 0},
    {"text": "Who hears", "choices": ["xq", "the old mouse?", "river river"], "answer": 1},
    {"text": "one horse finds the fish", "choices": ["the", "under a tree ."], "answer": 1},
]
CHOICES = """
task: toy_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: toy_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.filterwarnings("default")  # the harness's own
def test_a_local_task_gives_the_models_own_figures(world, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from indraquantum.inference.lm_eval import IndraQuantumLM

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = TrainSettings(
        data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", threads=1, d_model=14, layers=1, heads=2,
        mlp_width=22, batch_tokens=480, learning_rate=5e-3, max_steps=12,
    )  # fmt: skip
    checkpoint = train(settings).checkpoint
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choices", CHOICES), ("text", ROLLING)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(file=file))
    found = lm_eval.simple_evaluate(
        IndraQuantumLM(str(checkpoint), batch_size=2),
        tasks=["toy_choices", "toy_text"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]

    model, tokenizer = load_model(checkpoint, torch.device("cpu"))

    def log_likelihood(context: str, text: str) -> float:
        ids, begin = tokenizer.encode_prompt(context + text), len(tokenizer.encode_prompt(context))
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_p[place - 1, ids[place]].item() for place in range(begin, len(ids)))

    hits, total, size = 0, 0.0, 0
    for question in QUESTIONS:
        scores = [log_likelihood(question["text"], " " + choice) for choice in question["choices"]]
        hits += scores.index(max(scores)) == question["answer"]
        total += log_likelihood("", question["text"])
        size += len(question["text"].encode())
    assert found["toy_choices"]["acc,none"] == pytest.approx(hits / 3)
    assert found["toy_text"]["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / size, rel=1e-5)
