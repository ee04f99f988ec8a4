"""The command line: every setting in the help with its sentence, every wrong one refused in one line with status 2."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from indraquantum import cli, config

COMMANDS = {
    "ablate": config.AblateSettings,
    "bench": config.BenchSettings,
    "demo": config.DemoSettings,
    "doctor": config.DoctorSettings,
    "prepare": config.PrepareSettings,
    "data show": config.ShowSettings,
    "capture": config.CaptureSettings,
    "teacher": config.TeacherSettings,
    "lr-test": config.LrTestSettings,
    "runs": config.RunsSettings,
    "runs compare": config.RunsSettings,
    "train": config.TrainSettings,
    "test": config.TestSettings,
    "chat": config.ChatSettings,
    "serve": config.ServeSettings,
    "eval": config.EvalSettings,
    "export": config.ExportSettings,
    "monitor": config.MonitorSettings,
}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def words(text: str) -> str:
    """Return the text without blanks, line breaks and the frame of the help, so that its width does not matter."""
    return re.sub(r"[\s│╭╮╰╯─]+", "", text)


def option(name: str) -> str:
    """How the command line writes the field `name`."""
    return "--" + name.strip("_").replace("_", "-")


def test_the_table_has_every_command_that_has_settings(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "docs" / "tools")
    from options_page import commands, settings_of

    found = {name: settings_of(command.default_command) for name, command in commands(cli.app)}
    assert {name: settings for name, settings in found.items() if settings} == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_field_with_its_sentence(capsys, command):
    status, out, _ = run(capsys, *command.split(), "--help")
    assert status == 0
    for name, field in COMMANDS[command].model_fields.items():
        assert option(name) in out
        assert words(field.description) in words(out)
        if field.default is not None:
            assert words(f"[default: {field.default}]") in words(out)


@pytest.mark.parametrize(
    ("settings", "name"), sorted({(each, name) for each in COMMANDS.values() for name in each.model_fields}, key=str)
)
def test_the_help_of_an_option_is_a_sentence_that_says_more_than_its_name(settings, name):
    help_text = settings.model_fields[name].description
    choices = str(settings.model_fields[name].annotation)
    assert help_text[0].isupper() or f"'{help_text.split()[0]}'" in choices
    assert help_text.endswith(".")
    told = set(re.findall(r"[a-z]+", help_text.lower())) - {part.rstrip("s") for part in name.split("_")}
    assert len({word for word in told if len(word) > 3 and word.rstrip("s") not in name}) >= 2, help_text


@pytest.mark.parametrize(
    ("arguments", "field", "value", "allowed"),
    [
        (("train", "--epochs", "0"), "--epochs", "0", "greater than or equal to 1"),
        (("train", "--epochs", "two"), "--epochs", "two", "valid integer"),
        (("train", "--learning-rate", "nan"), "--learning-rate", "nan", "finite"),
        (("train", "--device", "tpu"), "--device", "tpu", "'auto', 'cpu', 'cuda' or 'mps'"),
        (("train", "--dropout", "1"), "--dropout", "1", "less than 1"),
        (("prepare", "--max-length", "1"), "--max-length", "1", "greater than or equal to 8"),
        (("capture", "--draws", "0"), "--draws", "0", "greater than or equal to 1"),
        (("test", "x.pt", "--top-p", "1.5"), "--top-p", "1.5", "less than or equal to 1"),
        (("export", "x.pt", "folder", "--as", "tar"), "--as:", "tar", "'onnx' or 'page'"),
        (("train", "--epoch", "1"), "--epoch", "", "Did you mean"),
        (("trian",), "trian", "", "Did you mean"),
        (("test",), "CHECKPOINT", "", "requires an argument"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, arguments, field, value, allowed):
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert field in err
    assert value in err
    assert allowed in err


def started_with(monkeypatch, capsys, *arguments: str) -> config.TrainSettings:
    """The settings that the command line hands to the training loop."""
    taken = []
    monkeypatch.setattr("indraquantum.training.loop.train", taken.append)
    status, _, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    return taken[0]


def test_options_from_a_file_count_where_the_command_line_is_silent(monkeypatch, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 7\nlearning_rate: 1e-3\nno_teacher: true\ndata: some/where\n")
    settings = started_with(monkeypatch, capsys, "train", "--epochs", "2", "--options", str(path), "--seed=5")
    stated = {name: getattr(settings, name) for name in settings.model_fields_set}
    expected = {"epochs": 2, "seed": 5, "learning_rate": 1e-3, "no_teacher": True, "data": Path("some/where")}
    assert stated == expected
    assert started_with(monkeypatch, capsys, f"--options={path}", "train").epochs == 7
    assert not started_with(monkeypatch, capsys, "train").model_fields_set  # nothing is left of the file


@pytest.mark.parametrize(
    ("content", "field", "said"),
    [
        ("epoch: 7", "epoch", "Did you mean --epochs"),
        ("epochs: 0", "--epochs", "greater than or equal to 1"),
        ("epochs: [1, 2]", "epochs", "unable to convert"),
        ("epochs: {a: 1}", "epochs", "must have one value"),
        ("epochs: {}", "epochs", "must have one value"),
        ("learning_rate: {0: 1e-3}", "learning_rate", "must have one value"),
        ("sample_prompt: [{0: a}]", "sample_prompt", "must have one value"),
        ("options: other.yaml", "options", "this one names the file"),
        ("epochs: 1\nepochs: 2", "--options", "given twice"),
        ("- epochs", "--options", "must hold options"),
        ("epochs: [", "--options", "must be YAML"),
        ("seed: 2024-13-45", "--options", "must be YAML"),
        ("seed: " + "1" * 5000, "--options", "must be YAML"),
        ("on: 2", "--options", "True; must be the name of an option; put it in quotes"),
        (None, "--options", "must be a file that can be read"),
    ],
)
def test_a_wrong_file_of_options_is_one_line(capsys, tmp_path, content, field, said):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    status, out, err = run(capsys, "train", "--options", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert field in err
    assert said in err


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "must be on a writable disk with free space"),
     (errno.EACCES, "must be accessible to you; check its permissions"),
     (errno.ENAMETOOLONG, "must be a shorter path")],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(capsys, number, said):
    def action():
        raise OSError(number, os.strerror(number), "some/file")

    assert cli.run_guarded(action) == 2
    assert capsys.readouterr().err == f"indra: error: some/file: got {os.strerror(number)}; {said}\n"
    number = errno.EBADF  # a bug, whose trace is wanted
    with pytest.raises(OSError, match="Bad file"):
        cli.run_guarded(action)


@pytest.mark.parametrize("printed", ["a line\n", "a line\n" * 100_000, ""])
def test_status_141_means_that_nobody_reads(monkeypatch, printed):
    reader, writer = os.pipe()
    os.close(reader)

    def action():
        print(printed, flush=True)
        raise BrokenPipeError

    with contextlib.suppress(BrokenPipeError), open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run_guarded(action) == 141


def test_another_broken_pipe_is_a_bug_whose_trace_is_wanted(capsys):
    def action():
        print("before")
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli.run_guarded(action)


@pytest.mark.parametrize("arguments", ["runs", "train --dry-run", "train --dry-run=true", "--options {} train"])
def test_only_a_run_is_shared_by_several_processes(monkeypatch, capsys, tmp_path, arguments):
    path = tmp_path / "mine.yaml"
    path.write_text("dry_run: true")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = run(capsys, *arguments.format(path).split())
    assert (status, out) == (2, "")
    said = "torchrun: got 2 processes; must be 1: only `indra train` runs in several processes"
    if arguments != "runs":
        said = "--dry-run: got True; must be left out with several processes"
    assert said in err


def test_the_shipped_files_of_options_run(world, root, tmp_path, capsys):
    paths = sorted((root / "configs" / "options").glob("*.yaml"))
    assert paths
    for path in paths:
        small = ["--d-model=14", "--heads=2", "--layers=1", "--mlp-width=22", "--batch-tokens=480", "--max-steps=2"]
        places = [f"--data={world.data}", f"--output={tmp_path / path.stem}", f"--logs={tmp_path / 'logs'}"]
        status, _, _ = run(capsys, "train", "--options", str(path), *small, *places)
        assert status == 0
        record = json.loads((tmp_path / "logs" / path.stem / "run.json").read_text())
        given = {option.split("=")[0].removeprefix("--").replace("-", "_") for option in small}
        stated = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name not in given}
        assert stated
        assert stated.items() <= record["settings"].items()


def test_settings_are_frozen_and_strict():
    with pytest.raises(ValueError, match="frozen"):
        config.TrainSettings().epochs = 5
    with pytest.raises(ValueError, match="epoch_count"):
        config.TrainSettings(epoch_count=5)


@pytest.mark.parametrize(
    ("script", "command"),
    [("prepare_mixed_data", "prepare"), ("train_phase2_v4_unified", "train"), ("test_phase2", "test")],
)
def test_a_script_is_its_command(root, capsys, script, command):
    result = subprocess.run(
        [sys.executable, root / "scripts" / f"{script}.py", "--help"], capture_output=True, text=True, check=True
    )
    _, out, _ = run(capsys, command, "--help")
    assert words(result.stdout) == words(out)


def test_bench_prints_every_figure_and_writes_them(capsys, tmp_path):
    status, out, _ = run(capsys, "bench", "--quick", "--repeats=1", "--threads=1", f"--json-file={tmp_path / 'b.json'}")
    assert status == 0
    figures = {figure["name"]: figure["value"] for figure in json.loads((tmp_path / "b.json").read_text())["figures"]}
    assert {"objective_share_of_matmul_rate", "distillation_cost", "step_mfu", "step_over_llama"} <= figures.keys()
    assert all(value > 0 for value in figures.values())
    assert all(name in out for name in figures)


def test_a_log_file_has_each_line_as_soon_as_it_is_said():
    said = "cli.run_guarded = lambda action: (print('step 1'), sys.stdin.read(), 0)[-1]"
    program = f"import sys; from indraquantum import cli; {said}; cli.main(['runs'])"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=buffered, **pipes) as process:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready or process.kill(), "nothing after a minute"
        assert process.stdout.readline() == b"step 1\n"
        process.stdin.close()
        assert process.wait() == 0


def test_a_ctrl_c_is_told(monkeypatch, capsys):
    monkeypatch.setattr("indraquantum.monitor.run_table.list_runs", lambda logs: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["runs"])
    assert (exit_.value.code, capsys.readouterr().err) == (130, "indra: interrupted\n")


def test_what_is_stopped_by_sigterm_leaves_no_temporary_files(world, tmp_path):
    waits = "prepare.write_padded = lambda *_: (print('half', flush=True), time.sleep(600))"
    program = f"import time; from indraquantum import cli; from indraquantum.data import prepare; {waits}; cli.main()"
    options = ["prepare", "--wikitext", world.wikitext, "--alpaca", world.alpaca, "--tokenizer", world.tokenizer]
    command = [sys.executable, "-c", program, *options, "--output", tmp_path / "mixed.pkl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        assert list(tmp_path.glob(".prepare-*/*"))
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
