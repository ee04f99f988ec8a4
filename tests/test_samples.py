"""`--sample-every`: samples of a run are those of its checkpoints, and change nothing in the run."""

from __future__ import annotations

import itertools
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import survival
from indraquantum.config import PrepareSettings, TestSettings, TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepare import prepare
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.inference.load import load
from indraquantum.inference.write import continued
from indraquantum.live.details import details_of
from indraquantum.processes import Processes
from indraquantum.training import loop, samples
from indraquantum.training.checkpoint import load_checkpoint
from indraquantum.training.folders import set_others_metrics_aside
from indraquantum.training.parallel import WeightAverage
from indraquantum.training.samples import held_out_prompts, sample
from test_control_tokens import LLAMA, save

PROMPTS = ("the cat", "a dog")


def settings(world, folder, **changes) -> TrainSettings:
    return TrainSettings(
        **{"data": world.data, "output": folder / "run", "logs": folder / "logs", "threads": 1, "d_model": 6,
           "layers": 1, "heads": 2, "mlp_width": 10, "batch_tokens": 480, "max_steps": 7, "no_teacher": True,
           "save_every": 2, "keep_last": 9, "dropout": 0.1, "schedule": "constant", "residual": False, **changes},
    )  # fmt: skip


def samples_in(report) -> list[dict]:
    return [json.loads(line) for line in report.metrics.with_name("samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    return loop.train(settings(world, folder, sample_every=2, sample_prompt=PROMPTS))


def test_samples_are_what_the_checkpoints_write(sampled):
    found = samples_in(sampled)
    assert [(one["step"], one["prompt"]) for one in found] == [(step, p) for step in (2, 4, 6, 7) for p in PROMPTS]
    for one in found:
        path = sampled.checkpoint.with_name(f"checkpoint_v4_step_{one['step']}.pt")
        path = path if one["step"] < 7 else sampled.checkpoint
        assert continued(path, TestSettings(prompt=one["prompt"], device="cpu")).text == one["text"]
    assert len({one["text"] for one in found}) > 2


def test_the_run_is_the_same_to_the_bit_without_samples(world, tmp_path, sampled):
    plain = loop.train(settings(world, tmp_path))
    assert not plain.metrics.with_name("samples.jsonl").exists()
    assert details_of(plain.metrics)["samples"] == []
    ours, theirs = (load_checkpoint("", report.checkpoint) for report in (plain, sampled))
    assert all((value == theirs.model[name]).all() for name, value in ours.model.items())
    assert ours.settings == theirs.settings

    def without_speed(report):
        lines = [json.loads(line) for line in report.metrics.read_text().splitlines()]
        return [{name: v for name, v in line.items() if name not in ("tokens_per_second", "crc")} for line in lines]

    assert without_speed(plain) == without_speed(sampled)


def test_a_resumed_run_has_the_samples_of_one_that_was_never_stopped(world, tmp_path, sampled):
    loop.train(settings(world, tmp_path, sample_every=2, sample_prompt=PROMPTS, max_steps=5))
    (tmp_path / "run" / "checkpoint_v4_epoch_1.pt").unlink()  # resume at step 4; steps 5 and later come again
    with (tmp_path / "logs" / "run" / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "prompt"\n{"step": 6, "prompt": "x", "text": "of a later step"}\n{"half')
    report = loop.train(settings(world, tmp_path, sample_every=2, sample_prompt=PROMPTS))
    assert samples_in(report) == samples_in(sampled)
    assert details_of(report.metrics)["samples"] == samples_in(sampled)[::-1]


def test_interrupted_in_its_last_evaluation_a_run_still_writes_its_last_samples(world, tmp_path, sampled):
    given = settings(world, tmp_path, sample_every=2, sample_prompt=PROMPTS)

    def struck():
        survival.at(loop, "held_out_cross_entropy", "after", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        loop.train(given)

    assert survival.in_fork(struck) == 128 + signal.SIGTERM
    report = loop.train(given)
    assert samples_in(report) == samples_in(sampled)


def test_a_run_without_samples_keeps_none_that_are_not_its_own(world, tmp_path):
    loop.train(settings(world, tmp_path, sample_every=2, sample_prompt=PROMPTS, max_steps=5))
    (tmp_path / "run" / "checkpoint_v4_epoch_1.pt").unlink()  # resume at step 4
    report = loop.train(settings(world, tmp_path, max_steps=5))
    assert [one["step"] for one in samples_in(report)] == [2, 2, 4, 4]
    for path in (tmp_path / "run").glob("checkpoint*"):
        path.unlink()
    report = loop.train(settings(world, tmp_path, max_steps=1, seed=1))
    assert samples_in(report) == []


def test_samples_of_another_run_are_set_aside_with_its_metrics(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl", "metrics.jsonl.set-aside-1"):
        (tmp_path / name).write_text("{}\n")
    run = SimpleNamespace(folder=tmp_path / "run")
    set_others_metrics_aside(tmp_path / "metrics.jsonl", run, resumed=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl.set-aside-1", "metrics.jsonl.set-aside-2", "samples.jsonl.set-aside-2"
    ]  # fmt: skip


@pytest.mark.parametrize(("prompt", "allowed"), [("", "must not be empty"), ("\ud800", "must be UTF-8 text")])
def test_prompts_that_no_model_continues_are_refused_at_once(world, tmp_path, monkeypatch, prompt, allowed):
    monkeypatch.setattr(TextTokenizer, "_beginning", ())  # as of a tokenizer without BOS
    with pytest.raises(UserError, match=f"--sample-prompt: got '.*'; {allowed}"):
        loop.train(settings(world, tmp_path, sample_every=2, sample_prompt=("the cat", prompt)))
    assert not (tmp_path / "run").exists()


def test_the_prompts_are_held_out_and_leave_out_the_answer(world):
    dataset = open_dataset("--data", world.data)
    wiki, alpaca = held_out_prompts(dataset)
    split = dataset.validation
    texts = [
        dataset.tokenizer.decode(split.tokens[begin:end].tolist())
        for begin, end in zip(split.document_offsets, split.document_offsets[1:], strict=False)
    ]
    assert any(text.startswith(wiki) and len(wiki) < len(text) for text in texts)
    assert alpaca.endswith("### Response:\n")
    assert any(text.startswith(alpaca) and len(alpaca) < len(text) for text in texts)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_prompt_ends_with_a_whole_character(tmp_path, shift):
    """A byte is a token here and most characters have three, so 24 tokens end within one for two of the shifts."""
    save(tmp_path / "tokenizer", LLAMA, config={"bos_token": "<s>", "eos_token": "</s>"})
    orders = itertools.islice(itertools.permutations("一二三四五六"), 120)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("a" * shift + "".join(order) * 3 for order in orders), "utf-8")
    prepared = prepare(
        PrepareSettings(text=(str(text),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(tmp_path / "tokenizer"),
                        max_length=64, output=tmp_path / "d.pkl")
    )  # fmt: skip
    dataset = open_dataset("--data", prepared.folder)
    split = dataset.validation
    (prompt,) = held_out_prompts(dataset)
    first = split.tokens[split.document_offsets[0] : split.document_offsets[1]].tolist()
    assert dataset.tokenizer.decode(first).startswith(prompt)
    assert len(prompt) == shift + 7  # 23 bytes


def test_averaged_weights_are_sampled_and_put_back(world, tmp_path):
    report = loop.train(settings(world, tmp_path, sample_every=7, sample_prompt=PROMPTS, ema_decay=0.9))
    for one in samples_in(report):
        assert continued(report.checkpoint, TestSettings(prompt=one["prompt"], device="cpu")).text == one["text"]


def test_sampling_leaves_torchs_random_state_and_the_mode(sampled):
    loaded = load(sampled.checkpoint, torch.device("cpu"))
    model = loaded.model.train()
    run = SimpleNamespace(
        dataset=SimpleNamespace(tokenizer=loaded.tokenizer), model=model, device=torch.device("cpu"),
        settings=SimpleNamespace(compile=False), average=WeightAverage(model, 0.0),
    )  # fmt: skip
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert sample(run, "the cat") == samples_in(sampled)[-2]["text"]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_model_that_no_process_holds_is_refused(world, tmp_path):
    """In one process there is no sharding, so it holds the whole model."""
    given, tokenizer = settings(world, tmp_path, sample_every=2, parallel="fsdp2"), None
    with pytest.raises(UserError, match="--sample-every: got 2; must be 0 with --parallel fsdp2"):
        samples.check_samples(given, tokenizer, Processes(1, world=2))
    assert samples_in(loop.train(given))
