"""The whole pipeline on Python's own manual at toy size, the notebook on its run, and the commands on its files."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from rich.console import Console

import survival
from indraquantum import cli
from indraquantum.config import DemoSettings
from indraquantum.demo import PROMPTS, DemoReport, print_summary, run_demo
from indraquantum.errors import UserError
from indraquantum.inference.generate import GeneratedText, TokenState
from indraquantum.inference.write import print_states
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "training_monitor.ipynb"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The tiny demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    printed, notes, logger = [], logging.Handler(), logging.getLogger("indraquantum")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        patch.setattr(notes, "emit", lambda record: printed.append(record.getMessage()))
        logger.addHandler(notes)
        logger.setLevel(logging.INFO)
        try:
            report = run_demo(DemoSettings(output=folder / "demo", tiny=True, threads=1))
        finally:
            logger.setLevel(level)
            logger.removeHandler(notes)
    return report, "\n".join(printed)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def test_the_student_ends_clearly_below_the_unigram(demo):
    report, printed = demo
    assert report.after < report.unigram - 0.1
    assert report.after < report.before - 1
    assert report.teacher < report.unigram - 0.1
    assert len(report.answers) == len(PROMPTS)
    assert "held-out cross-entropy" in printed


def test_every_file_it_names_is_there(demo):
    for path in demo[0].files.values():
        assert path.exists()
        assert path.is_dir() or path.stat().st_size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "--seed: got 1; must be 0, as in the demo that "),
        ({"tiny": False}, "--tiny: got False; must be True, as in the demo that "),
        ({"real": True}, "--real: got True; must be False, as in the demo that "),
    ],
)
def test_another_demo_does_not_replace_the_data_of_the_one_that_is_there(demo, options, said):
    folder = demo[0].files["corpus"].parent
    before = survival.content_of(folder)
    with pytest.raises(UserError) as refused:
        run_demo(DemoSettings(**{"output": folder, "tiny": True, "threads": 1, **options}))
    assert str(refused.value).startswith(said)
    assert survival.content_of(folder) == before


def test_a_demo_that_failed_before_its_data_were_there_locks_nothing(tmp_path, monkeypatch):
    settings = DemoSettings(output=tmp_path / "demo", tiny=True, threads=1)

    def refused(*arguments, **options):
        raise UserError("--wikitext", "x", "does not exist")

    with monkeypatch.context() as patch:
        patch.setattr("indraquantum.demo.prepare", refused)
        with pytest.raises(UserError, match="--wikitext"):
            run_demo(settings)
    assert not (tmp_path / "demo" / "demo.json").exists()


def test_a_demo_of_an_earlier_version_keeps_its_seed(demo, tmp_path):
    folder = shutil.copytree(demo[0].files["corpus"].parent, tmp_path / "demo")
    (folder / "demo.json").unlink()
    before = survival.content_of(folder)
    for options, said in (({"seed": 1}, "--seed: got 1; must be 0"), ({"real": True}, "--real: got True; must be F")):
        with pytest.raises(UserError, match=said):
            run_demo(DemoSettings(**{"output": folder, "tiny": True, "threads": 1, **options}))
    assert survival.content_of(folder) == before


def test_the_notebook_runs_top_to_bottom_on_its_run(demo, monkeypatch):
    monkeypatch.setenv("INDRA_METRICS", str(demo[0].files["metrics"]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "stored without outputs"
    kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": str(NOTEBOOK.parent)}}}
    NotebookClient(notebook, timeout=120, **kernel).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 4


def test_text_is_the_same_for_the_same_seed(demo, capsys):
    arguments = ("test", demo[0].files["checkpoint"], "--prompt", "The for statement", "--max-new-tokens", "12")
    first, second = run(capsys, *arguments, "--seed", "1"), run(capsys, *arguments, "--seed", "1")
    assert first == second
    assert first[0] == 0
    assert first[1].startswith("The for statement")
    assert run(capsys, *arguments, "--seed", "2")[1] != first[1]


def test_show_state_prints_a_line_for_each_token(demo, capsys):
    status, out, _ = run(
        capsys, "test", demo[0].files["checkpoint"], "--instruction", "What does os.path.join do?",
        "--max-new-tokens", "5", "--temperature", "0", "--show-state",
    )  # fmt: skip
    assert status == 0
    assert "### Instruction:\nWhat does os.path.join do?\n\n### Response:\n" in out
    rows = re.findall(r"│ .* │ +([\d.]+) +│ +([\d.]+) +│ +(-?[\d.]+) +│", out)
    assert 1 <= len(rows) <= 5
    assert all(0 < float(probability) <= 1 for probability, _, _ in rows)
    assert all(0 <= float(uncertainty) <= math.log(512) for _, _, uncertainty in rows)
    assert f"between 0 and ln V = {math.log(512):.2f} nats" in out


UNTAUGHT = {"shape": "constant", "value": 0.0}


@pytest.mark.parametrize(
    ("untaught", "columns", "said"),
    [
        (("phase", "magnitude"), 2, "the magnitude or the phase readout with a teacher, so no confidence or unc"),
        (("phase",), 3, "never aligned the phase readout with a teacher, so no uncertainty is shown"),
        (("magnitude",), 3, "never aligned the magnitude readout with a teacher, so no confidence is shown"),
    ],
)
def test_a_readout_that_was_never_aligned_is_not_read(demo, capsys, tmp_path, untaught, columns, said):
    checkpoint = load_checkpoint("", demo[0].files["checkpoint"])
    (stage,) = checkpoint.settings["stages"].values()
    stage["weights"] |= dict.fromkeys(untaught, UNTAUGHT)
    # a stage that has not begun aligns nothing yet
    checkpoint.settings["stages"]["later"] = stage | {"weights": {"phase": 1.0, "magnitude": 1.0}}
    path = tmp_path / "checkpoint_v4_epoch_1.pt"
    save_checkpoint(path, checkpoint)
    status, out, _ = run(capsys, "test", path, "--prompt", "The", "--max-new-tokens", "3", "--show-state")
    assert status == 0
    assert said in out
    assert {line.count("│") for line in out.splitlines() if line.startswith("│")} == {columns + 1}


def test_an_uncertainty_beyond_what_there_is_reads_as_the_end(capsys):
    tokens = [TokenState("a", 0.5, 0.5, nats) for nats in (-0.3, 1.25, 15.5)]
    print_states(GeneratedText("aaa", tokens), {"phase", "magnitude"}, math.log(32_000))
    assert re.findall(r"([\d.-]+) +│$", capsys.readouterr().out, re.MULTILINE) == ["0.00", "1.25", "10.37"]


def test_brackets_of_a_token_or_a_path_are_no_markup(capsys, monkeypatch, tmp_path):
    texts = ["[/INST]", "[bold]", "a\\[/]"]
    print_states(GeneratedText("", [TokenState(text, 0.5, 0.5, 1.0) for text in texts]), set(), math.log(32_000))
    shown = capsys.readouterr().out
    assert all(repr(text) in shown for text in texts)
    report = DemoReport(4.0, 3.0, 2.0, 1.0, {"checkpoint": tmp_path / "[red]a[/b].pt"}, [])
    monkeypatch.setattr(sys, "argv", ["/opt/tools/indra", "demo"])
    print_summary(Console(width=400), report, 1.0)
    out = capsys.readouterr().out
    path = str(tmp_path / "[red]a[/b].pt")
    assert f"  /opt/tools/indra test {path} --instruction" in out
    assert out.count(path) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt: got None; give either"),
        (("--prompt", "a", "--instruction", "b"), "give either"),
        (("--prompt", "a", "--input", "b"), "--input: got b; must be given together with --instruction"),
    ],
)
def test_what_to_write_about_must_be_clear(demo, capsys, arguments, message):
    status, out, err = run(capsys, "test", demo[0].files["checkpoint"], *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_checkpoint_of_another_shape_is_refused(demo, capsys, tmp_path):
    checkpoint = load_checkpoint("", demo[0].files["checkpoint"])
    checkpoint.model["head.bias_V"] = torch.zeros(7)
    save_checkpoint(tmp_path / "checkpoint_v4_epoch_1.pt", checkpoint)
    status, out, err = run(capsys, "test", tmp_path / "checkpoint_v4_epoch_1.pt", "--prompt", "a")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "must hold weights that fit its own settings" in err


def test_a_missing_checkpoint_is_one_line(capsys, tmp_path):
    status, out, err = run(capsys, "test", tmp_path / "gone.pt", "--prompt", "a")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "gone.pt; must be a checkpoint" in err


def test_the_three_scripts_on_local_files(demo, tmp_path):
    """The three commands of the README, on the demo's corpus, tokenizer and teacher; test_cli.py starts them anew."""
    files = demo[0].files

    def script(name: str, *arguments: object) -> str:
        def act():
            os.chdir(tmp_path)
            sys.argv = [name, *map(str, arguments)]
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")

        said = tmp_path / "said"
        assert survival.in_fork(act, said) == 0, said.read_text()
        return said.read_text()

    prepared = script(
        "prepare_mixed_data.py", "--wikitext", files["corpus"] / "manual.txt",
        "--alpaca", files["corpus"] / "questions.json", "--tokenizer", files["tokenizer"],
    )  # fmt: skip
    assert "data/mixed_train.pkl" in prepared
    script(
        "train_phase2_v4_unified.py", "--teacher", files["teacher"], "--max-steps", 2, "--batch-tokens", 512,
        "--d-model", 16, "--layers", 1, "--mlp-width", 32,
    )  # fmt: skip
    checkpoint = "checkpoints/phase2_v4_unified/checkpoint_v4_epoch_1.pt"
    assert (tmp_path / "logs" / "phase2_v4_unified" / "metrics.jsonl").read_text().count("\n") == 3
    prompt = "The future of AI is"
    assert script("test_phase2.py", checkpoint, "--prompt", prompt, "--max-new-tokens", 4).startswith(prompt)
    kept = json.loads((tmp_path / "data" / "teacher_signals" / "manifest.json").read_text())
    assert kept["complete"]
