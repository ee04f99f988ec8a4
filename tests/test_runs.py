"""`indra runs`: what it says of a run is what the run's own files say."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.files import folder_lock
from indraquantum.metrics import Line, MetricsLog
from indraquantum.monitor import run_table
from indraquantum.monitor.runs import all_runs, named_runs
from indraquantum.training import loop
from indraquantum.training.checkpoint import load_checkpoint
from indraquantum.training.folders import folder_of_record, set_others_metrics_aside
from indraquantum.training.run import BestHeldOut

HELD_OUT = [{"wiki": 5.0, "all": 6.0}, {"wiki": 4.5, "all": 5.5}, {"wiki": 4.25, "all": 5.75}]


def write_run(folder, settings=None, finished=False, steps=(0, 10, 20), held_out=HELD_OUT):
    log = MetricsLog(folder / "metrics.jsonl")
    for step, figures in zip(steps, held_out, strict=True):
        log.write({"step": step, "tokens": 100 * step, "loss": 7.0 - step / 10 if step else None, "held_out": figures})
    log.close()
    if settings is not None:
        record = {"settings": settings, "data": "ab" * 32, "signals": None, "total_steps": 20, "finished": finished}
        (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def logs(tmp_path):
    write_run(tmp_path / "a", {"seed": 0, "epochs": 1, "output": "x", "strategy": "stage1"}, finished=True)
    write_run(tmp_path / "deep" / "b", {"seed": 1, "epochs": 1, "output": "y"})
    write_run(tmp_path / "old")  # before there were records
    return tmp_path


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["runs", *map(str, words)])
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def test_the_list_by_hand(logs, capsys):
    status, out, _ = run(capsys, f"--logs={logs}")
    assert status == 0
    assert out.splitlines() == [
        "run\tstrategy\tstate\tsteps\ttokens\tloss\twiki (best)\tall (best)",
        "a\tstage1\tfinished\t20/20\t2,000\t5.0000\t4.2500 (4.5000)\t5.7500 (5.5000)",
        "deep/b\t-\tstopped\t20/20\t2,000\t5.0000\t4.2500 (4.5000)\t5.7500 (5.5000)",
        "old\t-\tstopped\t20/-\t2,000\t5.0000\t4.2500 (4.5000)\t5.7500 (5.5000)",
    ]


def test_a_run_whose_folder_is_locked_is_running(logs):
    with folder_lock("--logs", logs / "deep" / "b"):
        assert [found.state for found in all_runs(logs)] == ["finished", "running", "stopped"]
    assert all_runs(logs)[1].state == "stopped"


def test_the_comparison_shows_what_differs_and_the_figures(logs, capsys):
    status, out, _ = run(capsys, "compare", "a", logs / "deep" / "b", f"--logs={logs}")
    assert status == 0
    lines = out.splitlines()
    assert lines[:3] == ["\ta\tdeep/b", "--seed\t0\t1", "--strategy\tstage1\t-"]
    assert lines[3:] == [
        "state\tfinished\tstopped", "steps\t20\t20", "tokens\t2,000\t2,000", "loss\t5.0000\t5.0000",
        "wiki, last\t4.2500\t4.2500", "wiki, best\t4.5000\t4.5000", "all, last\t5.7500\t5.7500",
        "all, best\t5.5000\t5.5000",
    ]  # fmt: skip


def test_a_folder_elsewhere_is_called_by_its_own_name(logs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "compare", logs / "a", logs / "deep" / "b")
    assert (status, out.splitlines()[0]) == (0, "\ta\tb")


def test_in_a_terminal_it_is_a_table(logs, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    run_table.list_runs(logs)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "┃ strategy ┃" in out
    assert "4.2500 (4.5000)" in out


def test_what_is_no_run_is_one_line(logs, capsys, tmp_path_factory):
    status, _, err = run(capsys, "compare", "a", "nothing", f"--logs={logs}")
    assert (status, err.count("\n")) == (2, 1)
    assert "RUNS: got nothing; must be a run below" in err
    assert "(a, deep/b, old)" in err
    status, _, err = run(capsys, f"--logs={tmp_path_factory.mktemp('empty')}")
    assert (status, err.count("\n")) == (2, 1)
    assert "must hold runs" in err


DAMAGED_RECORDS = [
    b"[]", b"{", b"\xff", b"[" * 100_000, b'{"settings": {}, "x": ' + b"1" * 5000 + b"}",
    b"{" + b" " * (1 << 20) + b"}",
    b'{"settings": 3}', b'{"settings": {}, "total_steps": "20"}', b'{"settings": {}, "finished": 1}',
    b'{"settings": {}, "total_steps": true}', b"{}",
]  # fmt: skip
DAMAGED_LINES = [
    b"{nothing", b'{"step": "9"}', b'{"step": 1, "tokens": 1.5}', b'{"step": 1, "loss": "low"}', b'{"step": -1e999}',
    b'{"step": 1, "held_out": [1]}', b'{"step": 1, "held_out": {"wiki": 1.0}}',
    b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1, "held_out": {"all": "5"}}', b'{"step": 1, "held_out": 5}', b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED_RECORDS, ids=range(len(DAMAGED_RECORDS)))
def test_a_damaged_record_does_not_hide_the_others(logs, capsys, content):
    (logs / "a" / "run.json").write_bytes(content)
    status, out, _ = run(capsys, f"--logs={logs}")
    assert (status, out.count("\n")) == (0, 4)
    assert out.splitlines()[1].startswith("a\t-\tdamaged: run.json: must be ")
    assert "\ndeep/b\t-\tstopped\t20/20" in out
    assert run(capsys, "compare", "deep/b", "a", f"--logs={logs}")[0] == 0


@pytest.mark.parametrize("content", DAMAGED_LINES, ids=range(len(DAMAGED_LINES)))
def test_a_damaged_line_is_told_and_does_not_hide_the_others(logs, capsys, content):
    with (logs / "old" / "metrics.jsonl").open("ab") as file:
        file.write(content + b"\n")
    status, out, _ = run(capsys, f"--logs={logs}")
    assert (status, out.count("\n")) == (0, 4)
    assert out.splitlines()[3].startswith("old\t-\tdamaged: metrics.jsonl: its line 4 ")
    assert "\na\tstage1\tfinished\t20/20" in out


def test_what_is_no_file_and_names_that_no_terminal_prints_harm_nothing(logs, capsys):
    (logs / "folder" / "metrics.jsonl").mkdir(parents=True)
    (logs / "link").mkdir()
    (logs / "link" / "metrics.jsonl").symlink_to("nowhere")
    (logs / "pipe").mkdir()
    os.mkfifo(logs / "pipe" / "metrics.jsonl")
    record = {"settings": {"strategy": "one\ttwo\n\ud800\x1b[2J" + "long" * 1000}}
    (logs / "a" / "run.json").write_text(json.dumps(record))
    status, out, _ = run(capsys, f"--logs={logs}")
    assert (status, out.count("\n")) == (0, 4)
    assert out.splitlines()[1].startswith("a\tone\\ttwo\\n\\ud800\\x1b[2Jlong")
    assert len(out) < 1000


def test_a_long_run_is_listed_without_parsing_it(logs, monkeypatch):
    """A line in 20 is an evaluation: those and the last one are parsed, however many there are."""
    write_run(logs / "long", steps=range(1001), held_out=[{"all": 5.0} if not n % 20 else None for n in range(1001)])
    parsed, parse = [], Line.parse
    monkeypatch.setattr(Line, "parse", lambda line: parsed.append(line.number) or parse(line))
    (found,) = named_runs(logs, ("long",))
    assert (found.state, found.steps, found.loss) == ("stopped", 1000, 7.0 - 100)
    assert set(parsed) == set(range(1, 1002, 20))
    assert len(parsed) < 2 * 51


def test_a_real_run_is_told_as_it_was(world, tmp_path):
    settings = TrainSettings(
        data=world.data, output=tmp_path / "one", logs=tmp_path / "logs", threads=1, d_model=6, layers=1, heads=2,
        mlp_width=10, batch_tokens=480, max_steps=3,
    )  # fmt: skip
    report = loop.train(settings)
    (found,) = named_runs(tmp_path / "logs", ("one",))
    checkpoint = load_checkpoint("", report.checkpoint)
    assert (found.state, found.steps, found.total_steps, found.tokens) == ("finished", 3, 3, checkpoint.tokens)
    assert found.last_held_out == report.held_out
    assert {name: found.settings[name] for name in ("max_steps", "data")} == {
        "max_steps": 3, "data": checkpoint.settings["data"],
    }  # fmt: skip


def small(world, folder, **changes) -> TrainSettings:
    return TrainSettings(
        **{"data": world.data, "output": folder / "run", "logs": folder / "logs", "threads": 1, "d_model": 6,
           "layers": 1, "heads": 2, "mlp_width": 10, "batch_tokens": 480, "max_steps": 4, "no_teacher": True,
           "evaluate_every": 2, "schedule": "constant", **changes},
    )  # fmt: skip


def test_metrics_of_another_run_are_neither_continued_nor_replaced(world, tmp_path, capsys):
    other, own = small(world, tmp_path / "other", seed=1), small(world, tmp_path / "own")
    theirs = loop.train(other).metrics.read_bytes()
    report = loop.train(own)
    ours, folder = report.metrics.read_bytes(), report.metrics.parent
    (folder / "run.json").unlink()
    report.metrics.write_bytes(theirs)
    loop.train(own.model_copy(update={"max_steps": 5}))
    assert (folder / "metrics.jsonl.set-aside-1").read_bytes() == theirs
    assert "belongs to another run" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in report.metrics.read_bytes().splitlines()] == [5]
    for path in (tmp_path / "own" / "run").glob("checkpoint*"):
        path.unlink()
    (folder / "run.json").unlink()
    report.metrics.write_bytes(theirs)
    assert loop.train(own).metrics.read_bytes() != theirs
    assert (folder / "metrics.jsonl.set-aside-2").read_bytes() == theirs
    assert len(ours.splitlines()) == len(report.metrics.read_bytes().splitlines())


@pytest.mark.parametrize("evaluate_every", [2, 100])
def test_a_run_in_a_copied_folder_continues_its_own_metrics(world, tmp_path, evaluate_every, capsys):
    there = tmp_path / "there"
    settings = small(world, there, evaluate_every=evaluate_every, epochs=1, max_steps=3, save_every=1)
    loop.train(settings)
    here = shutil.copytree(there, tmp_path / "here")
    shutil.rmtree(there)
    moved = {"output": here / "run", "logs": here / "logs", "max_steps": 4}
    report = loop.train(settings.model_copy(update=moved))
    assert [json.loads(line)["step"] for line in report.metrics.read_bytes().splitlines()] == [0, 1, 2, 3, 4]
    assert "another run" not in capsys.readouterr().err
    assert list(report.metrics.parent.glob("*aside*")) == []


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"{" + b" " * (1 << 20) + b"}",
        b'{"settings": {"output": "a\\u0000b", "logs": "x"}}',
        b'{"settings": 1}',
    ],
    ids=["deep", "large", "zero", "number"],
)
def test_a_damaged_record_is_nobodys_and_stops_no_run(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert folder_of_record(tmp_path) is None


@pytest.mark.parametrize("line", [{"step": 6}, {"step": 6, "held_out": [1.0]}, {"step": 6, "held_out": None}])
@pytest.mark.parametrize("best", [None, 2.5])
def test_metrics_whose_lines_lack_figures_are_set_aside_as_another_runs(tmp_path, line, best):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line) + "\n")
    settings = SimpleNamespace(output=tmp_path / "run")
    run = SimpleNamespace(best=BestHeldOut(best, 6), step=6, tokens=60, settings=settings)
    set_others_metrics_aside(path, run, resumed=True)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl.set-aside-1"]
