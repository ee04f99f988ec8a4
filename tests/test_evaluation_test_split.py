"""The test split: nothing but a final report reads it, and each reading is recorded."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from indraquantum.ablation.final import measure_finally, read_final
from indraquantum.ablation.one_run import run_task
from indraquantum.config import (
    CaptureSettings,
    EvalSettings,
    LrTestSettings,
    TeacherSettings,
    TestSettings,
    TrainSettings,
)
from indraquantum.data import dataset as datasets
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.evaluation.test_split import read_test_split, readings_path
from indraquantum.files import write_manifest_json
from indraquantum.inference.load import load_model
from indraquantum.inference.report import evaluate_checkpoint
from indraquantum.inference.write import write_text
from indraquantum.teacher.capture import capture
from indraquantum.training.loop import train
from indraquantum.training.pretrain_teacher import pretrain_teacher
from indraquantum.trials.dry_run import dry_run
from indraquantum.trials.lr_range import lr_range_test
from test_ablation import BASE, bench_of, folders, indra, record, write_plan

SMALL = {"d_model": 6, "layers": 1, "heads": 2, "mlp_width": 10, "batch_tokens": 480, "max_steps": 2, "threads": 1}


class Poison:
    """In place of the test split: whoever looks at anything of it fails."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split's {name} was read")


@pytest.fixture
def poisoned(monkeypatch):
    """Every dataset is opened with a test split that can't be looked at; that its bytes are whole is checked before."""
    open_folder = datasets._open_folder

    def opened(*arguments):
        dataset = open_folder(*arguments)
        assert dataset.test.num_documents > 0
        return replace(dataset, test=Poison())

    monkeypatch.setattr(datasets, "_open_folder", opened)
    monkeypatch.setattr(datasets, "_verify", lambda *arguments: None)


@pytest.fixture
def data(world, tmp_path):
    """A copy of the world's dataset, beside which readings may be recorded."""
    shutil.copytree(world.data, tmp_path / "data" / "mixed")
    return tmp_path / "data" / "mixed"


def test_nothing_but_a_final_report_reads_the_test_split(world, data, tmp_path, poisoned, no_pictures):
    small = {**SMALL, "data": data, "output": tmp_path / "run", "logs": tmp_path / "logs"}
    pretrain_teacher(
        TeacherSettings(
            data=data,
            output=tmp_path / "teacher",
            logs=tmp_path / "logs",
            width=8,
            layers=1,
            heads=2,
            steps=2,
            batch_tokens=480,
        )
    )
    capture(CaptureSettings(data=data, teacher=str(tmp_path / "teacher"), output=tmp_path / "signals"))
    train_settings = TrainSettings(**small, signals=tmp_path / "signals")
    dry_run(train_settings)
    lr_range_test(LrTestSettings(**small, signals=tmp_path / "signals", steps=10, picture=tmp_path / "lr.png"))
    report = train(train_settings)
    evaluate_checkpoint(report.checkpoint, EvalSettings(data=data, signals=tmp_path / "signals"))
    write_text(report.checkpoint, TestSettings(prompt="the cat", max_new_tokens=2))
    bench = bench_of(
        write_plan(world, tmp_path, data=str(data), signals=str(tmp_path / "signals"), base=BASE | {"max_steps": 2}),
        tmp_path,
    )
    bench.check()
    run_task(bench.trial("quantum", 0))
    run_task(bench.run("quantum", 3, {"table_rate": 1}))
    assert not readings_path(data).exists()
    with pytest.raises(AssertionError, match=r"the test split's .* was read"):
        evaluate_checkpoint(report.checkpoint, EvalSettings(data=data, split="test"))


@pytest.fixture
def checkpoint(world, data, tmp_path):
    options = {**SMALL, "data": data, "no_teacher": True}
    return train(TrainSettings(**options, output=tmp_path / "run", logs=tmp_path / "logs")).checkpoint


def test_each_reading_is_recorded_and_told(data, checkpoint, capsys):
    found = evaluate_checkpoint(checkpoint, EvalSettings(data=data, split="test"))
    assert "The test split is read for the first time." in capsys.readouterr().out
    path = readings_path(data)
    path.write_text(path.read_text() + json.dumps({"date": "1", "command": "other", "data": "another dataset"}) + "\n")
    again = evaluate_checkpoint(checkpoint, EvalSettings(data=data, split="test"))
    assert again.sources == found.sources
    assert (
        f"The test split was read once before, the last time by: indra eval {checkpoint} (20" in capsys.readouterr().out
    )
    assert len(path.read_text().splitlines()) == 3
    dataset = open_dataset("--data", data)
    model, _ = load_model(checkpoint, torch.device("cpu"))
    total, tokens, split = 0.0, 0, dataset.test
    for (start, length), document in zip(split.pieces.tolist(), split.piece_documents.tolist(), strict=True):
        end = min(start + length, split.document_offsets[document + 1] - 1)  # the reference: each piece alone
        ids = torch.from_numpy(split.tokens[start : end + 1].astype("int64"))
        if len(ids) == 1:  # nothing of it is predicted
            continue
        log_p = model(ids[None, :-1]).logits[0].log_softmax(1)
        total -= log_p.gather(1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
    assert found.sources["all"].tokens == tokens > 0
    assert found.sources["all"].cross_entropy == pytest.approx(total / tokens, rel=1e-5)
    assert math.isfinite(found.sources["all"].bits_per_byte)
    assert found.alignment is None


def test_what_can_not_be_read_or_recorded_is_one_line(world, data, checkpoint, tmp_path):
    test = {"data": data, "split": "test"}
    with pytest.raises(UserError, match=r"--signals: got \S+; must be left out with --split test"):
        evaluate_checkpoint(checkpoint, EvalSettings(**test, signals=world.signals))
    with pytest.raises(UserError, match="--split: got test; must be left out with --text, which has no splits"):
        evaluate_checkpoint(checkpoint, EvalSettings(**test, text=str(world.wikitext)))
    with pytest.raises(UserError, match="--split: got test; needs a dataset with a test split"):
        evaluate_checkpoint(checkpoint, EvalSettings(data=world.pickle, split="test"))
    half = json.dumps({"data": open_dataset("--data", data).content_sha256})
    for damaged in ("no record\n", f"{half}\n"):
        readings_path(data).write_text(f"\n{damaged}")
        with pytest.raises(UserError, match="is damaged: its line 2 does not record a reading of the test split"):
            evaluate_checkpoint(checkpoint, EvalSettings(**test))
        assert readings_path(data).read_text() == f"\n{damaged}"
    readings_path(data).unlink()
    readings_path(data).mkdir()
    with pytest.raises(UserError, match=r"can't be written .*, so the test split is not read"):
        evaluate_checkpoint(checkpoint, EvalSettings(**test))


def test_a_final_report_measures_every_run_once(world, data, tmp_path, capsys, no_pictures):
    changes = {"data": str(data), "seeds": [3], "search": None, "base": BASE | {"max_steps": 2}}
    variants = {"wide": {"no_teacher": True, "d_model": 8}, "narrow": {"no_teacher": True, "d_model": 6}}
    plan = write_plan(world, tmp_path, **changes, variants=variants, pairs=[["wide", "narrow"]])
    bench = bench_of(plan, tmp_path)
    tasks = [bench.run(variant, 3, {}) for variant in variants]
    run_task(tasks[0])
    with pytest.raises(UserError, match="--final: got narrow-seed3; must be trained first"):
        measure_finally(bench, tasks, "")
    run_task(tasks[1])
    assert indra("ablate", plan, *folders(tmp_path), "--final") == 0
    final = record(tmp_path, "final")
    checkpoint = tasks[0].settings.output / "checkpoint_v4_epoch_1.pt"
    figures = evaluate_checkpoint(checkpoint, EvalSettings(data=data, split="test")).sources["all"]
    assert final["runs"]["wide-seed3"]["sources"]["all"] == pytest.approx(vars(figures))
    wide, narrow = (final["runs"][f"{v}-seed3"]["sources"]["all"]["cross_entropy"] for v in variants)
    text = (tmp_path / "results" / "report.md").read_text()
    part = text[text.index("## Final figures") : text.index("## Size and speed")]
    assert f"({final['documents']} documents), read for this on {final['date']}, for the first time." in part
    assert f"| wide | all | 1 | {wide:.4f} |" in part
    assert f"| 3: {wide - narrow:+.4f} |" in part
    readings = readings_path(data).read_text()
    assert len(readings.splitlines()) == 2
    shutil.rmtree(tmp_path / "work")
    measure_finally(bench, tasks, "")  # the figures are there: neither checkpoints nor the test split are read again
    assert record(tmp_path, "final") == final
    (tmp_path / "results" / "final.json").unlink()
    with pytest.raises(UserError, match="--final: got wide-seed3; must still have its checkpoint"):
        measure_finally(bench, tasks, "")
    assert readings_path(data).read_text() == readings
    other = dict(final, runs={"wide-seed3": dict(final["runs"]["wide-seed3"], result_sha256="0" * 64)})
    del other["manifest_sha256"]
    write_manifest_json(tmp_path / "results" / "final.json", other)
    with pytest.raises(
        UserError,
        match=r"final\.json; holds the figures of another run than the one in wide-seed3\.json; remove final\.json",
    ):
        read_final(tmp_path / "results")
    without_runs = {name: value for name, value in final.items() if name != "runs"}
    (tmp_path / "results" / "final.json").write_text(json.dumps(without_runs))
    with pytest.raises(UserError, match=r"final\.json; is damaged"):
        read_final(tmp_path / "results")


def test_no_test_split_is_read_for_runs_that_all_failed(world, data, tmp_path, no_pictures):
    changes = {"data": str(data), "seeds": [3], "search": None, "base": BASE | {"max_steps": 2}, "pairs": []}
    plan = write_plan(world, tmp_path, **changes, variants={"wide": {"no_teacher": True, "d_model": 8}})
    bench = bench_of(plan, tmp_path)
    task = bench.run("wide", 3, {})
    run_task(task)
    failed = json.loads(task.result.read_text()) | {"status": "failed", "line": "its loss is not finite"}
    task.result.write_text(json.dumps(failed))
    with pytest.raises(UserError, match=r"--final: got .*; must hold a finished run of this plan"):
        measure_finally(bench, [task], "")
    assert not readings_path(data).exists()
    assert not (tmp_path / "results" / "final.json").exists()


def test_final_figures_that_lack_a_run_say_so(world, data, tmp_path, capsys, no_pictures):
    changes = {"data": str(data), "search": None, "pairs": [], "base": BASE | {"max_steps": 2}}
    variants = {"wide": {"no_teacher": True, "d_model": 8}}
    plan = write_plan(world, tmp_path, **changes, variants=variants, seeds=[3])
    assert indra("ablate", plan, *folders(tmp_path), "--final") == 0
    readings = readings_path(data).read_text()
    write_plan(world, tmp_path, **changes, variants=variants, seeds=[3, 5])
    capsys.readouterr()
    assert indra("ablate", plan, *folders(tmp_path), "--final") == 2
    said = (
        r"--final: got \S*final\.json; must hold the plan's finished runs, but differs in wide-seed5: use --report-only"
    )
    assert re.search(said, capsys.readouterr().err)
    assert readings_path(data).read_text() == readings
    assert indra("ablate", plan, "--output", tmp_path / "results", "--report-only") == 0
    said = "They do not cover the same runs as this report: only one of them has wide-seed5."
    assert said in (tmp_path / "results" / "report.md").read_text()


def test_a_final_report_refuses_the_checkpoint_of_another_run(world, data, tmp_path):
    changes = {"data": str(data), "seeds": [3], "search": None, "pairs": [], "base": BASE | {"max_steps": 2}}

    def bench_and_run(rate):
        variants = {"wide": {"no_teacher": True, "d_model": 8, "table_rate": rate}}
        bench = bench_of(write_plan(world, tmp_path, **changes, variants=variants), tmp_path)
        return bench, bench.run("wide", 3, {})

    run_task(bench_and_run(20)[1])
    bench, planned = bench_and_run(30)
    run = record(tmp_path, "wide-seed3")
    planned.result.write_text(json.dumps(run | {"settings": run["settings"] | {"table_rate": 30.0}}))
    with pytest.raises(UserError, match=r"--work: got \S*wide-seed3; must hold a run with table_rate 30\.0, not 20\.0"):
        measure_finally(bench, [planned], "")
    assert not readings_path(data).exists()


@pytest.mark.parametrize("other", ["--only", "--dry-run", "--report-only"])
def test_a_final_report_is_of_all_runs(world, tmp_path, capsys, other):
    plan = write_plan(world, tmp_path)
    given = (other, "quantum") if other == "--only" else (other,)
    assert indra("ablate", plan, *folders(tmp_path), "--final", *given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "got given; must not be given together with" in error


def test_without_a_test_split_a_final_report_is_refused_before_anything_runs(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "indraquantum.ablation.tasks.open_dataset", lambda *given: replace(open_dataset(*given), test=None)
    )
    plan = write_plan(world, tmp_path, seeds=[3], search=None)
    assert indra("ablate", plan, *folders(tmp_path), "--final") == 2
    assert "--final: got test; needs a dataset with a test split" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_record_that_was_cut_off_is_ignored_and_goes(data):
    dataset = open_dataset("--data", data)
    read_test_split("--split", data, dataset, "indra eval a.pt")
    whole = readings_path(data).read_bytes()
    readings_path(data).write_bytes(whole + whole[:20])
    reading = read_test_split("--split", data, dataset, "indra eval b.pt")
    assert len(reading.earlier) == 1
    assert [json.loads(line)["command"] for line in readings_path(data).read_text().splitlines()] == [
        "indra eval a.pt", "indra eval b.pt",
    ]  # fmt: skip


def test_a_record_without_its_line_break_counts(data):
    dataset = open_dataset("--data", data)
    read_test_split("--split", data, dataset, "indra eval a.pt")
    readings_path(data).write_bytes(readings_path(data).read_bytes().rstrip(b"\n"))
    assert len(read_test_split("--split", data, dataset, "indra eval b.pt").earlier) == 1
    assert len(read_test_split("--split", data, dataset, "indra eval c.pt").earlier) == 2
    assert readings_path(data).read_bytes().count(b"\n") == 3


def test_a_record_that_does_not_fit_is_taken_back(data, monkeypatch):
    dataset = open_dataset("--data", data)
    read_test_split("--split", data, dataset, "indra eval a.pt")
    before, opened = readings_path(data).read_bytes(), Path.open

    class Short:
        """A file on a disk that has room for 9 bytes."""

        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content):
            return self._file.write(content[:9])

    monkeypatch.setattr(Path, "open", lambda path, *mode, **options: Short(opened(path, *mode, **options)))
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\), so the test split is not read"):
        read_test_split("--split", data, dataset, "indra eval b.pt")
    assert readings_path(data).read_bytes() == before
