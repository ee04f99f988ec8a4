"""`indra ablate` at toy size: what is run, what is written, stops, refusals, failures."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from filelock import FileLock
from matplotlib.figure import Figure

import survival
from indraquantum import cli
from indraquantum.ablation import one_run, processes, results
from indraquantum.ablation.ablate import command_line
from indraquantum.ablation.blocks import markdown
from indraquantum.ablation.one_run import curve, measure, run_task
from indraquantum.ablation.plan import Plan, load_plan
from indraquantum.ablation.report import report_blocks
from indraquantum.ablation.results import check_result
from indraquantum.ablation.sizes import sizes_of
from indraquantum.ablation.tasks import Bench
from indraquantum.config import AblateSettings, EvalSettings, TestSettings
from indraquantum.errors import UserError
from indraquantum.inference.report import evaluate_checkpoint
from indraquantum.inference.write import write_text
from indraquantum.metrics import MetricsLog
from indraquantum.training import loop
from indraquantum.training.schedule import ORDER

BASE = {
    "layers": 1, "heads": 2, "mlp_width": 22, "batch_tokens": 480, "learning_rate": 5e-3, "evaluate_every": 5,
    "max_steps": 20,
}  # fmt: skip
PLAN = {
    "name": "toy",
    "base": BASE,
    "variants": {
        "quantum": {"projector": "quantum", "d_model": 7, "state_width": 6},
        "plain": {"projector": "none", "d_model": 8, "no_teacher": True},
        # Each step multiplies the matrices by 1 - 10 * 10 and so ends in infinity.
        "broken": {"projector": "linear", "d_model": 6, "learning_rate": 10, "weight_decay": 10},
    },
    "seeds": [3, 5],
    "pairs": [["quantum", "plain"]],
    "search": {
        "grid": [{"table_rate": 1}, {"table_rate": 20}],
        "variants": {"broken": [], "plain": [{"table_rate": 20, "learning_rate": 1e-6}, {"table_rate": 20}]},
        "fraction": 0.25,
    },
}


def write_plan(world, folder, **changes):
    folder.mkdir(exist_ok=True)
    path = folder / "plan.yaml"
    content = {**PLAN, "data": os.path.relpath(world.data, folder), "signals": str(world.signals), **changes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


def folders(folder):
    return "--output", folder / "results", "--work", folder / "work"


def record(folder, name):
    return json.loads((folder / "results" / f"{name}.json").read_text())


def without_timing(path):
    """Return a run's JSON without what may differ between two equal runs."""
    content = json.loads(path.read_text())
    kept = {name: value for name, value in content.items() if name not in ("timing", "command", "checkpoint_kept")}
    return json.dumps(kept)


def bench_of(plan, folder, keep=True):
    settings = AblateSettings(keep_checkpoints=keep)
    return Bench(load_plan(plan), settings, folder / "results", folder / "work", command_line(plan, settings))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The whole plan, two runs at a time."""
    folder = tmp_path_factory.mktemp("ablation")
    plan = write_plan(world, folder)
    assert indra("ablate", plan, *folders(folder), "--jobs", 2) == 0
    return folder, plan


def test_every_run_has_its_json_with_the_settings_of_its_variant(finished):
    folder, _ = finished
    for variant, changes in PLAN["variants"].items():
        for seed in PLAN["seeds"]:
            run = record(folder, f"{variant}-seed{seed}")
            stated = BASE | changes | run["chosen"]
            assert {name: run["settings"][name] for name in stated if name != "on_collapse"} == stated
            assert (run["variant"], run["seed"], run["settings"]["seed"], run["half"]) == (variant, seed, seed, "table")
            assert run["settings"]["data"]
            assert (run["settings"]["signals"] is None) == bool(changes.get("no_teacher"))
            assert run["command"].startswith("indra ablate ")
            assert run["versions"].keys() >= {"torch", "transformers"}
    assert not list((folder / "work").rglob("*.pt"))


def test_equal_tokens_and_exact_sizes(finished):
    folder, _ = finished
    runs = {v: record(folder, f"{v}-seed3") for v in ("quantum", "plain")}
    assert runs["quantum"]["tokens"] == runs["plain"]["tokens"] > 0
    assert runs["quantum"]["steps"] == runs["plain"]["steps"] == 20
    assert [line["tokens"] for line in runs["plain"]["curve"]][-1] == runs["plain"]["tokens"]
    # By hand: table, layer (4 squares, 3 of the MLP), norms, bias and scale, reference of the readout.
    vocabulary, width, mlp = 320, 8, 22
    parameters = vocabulary * width + 4 * width**2 + 3 * width * mlp + 3 * width + vocabulary + 1 + width
    assert runs["plain"]["parameters"] == parameters
    work = 4 * width**2 + 3 * width * mlp + 48 * width + vocabulary * width
    assert runs["plain"]["flops_per_token"] == 6 * work
    d, c, width = 7, 6, 12
    parameters = vocabulary * d + 4 * (d * c + c) + 4 * width**2 + 3 * width * mlp + 3 * width + vocabulary + 1 + width
    assert runs["quantum"]["parameters"] == parameters
    lifted = 4 * width**2 + 3 * width * mlp + 48 * width + vocabulary * width + (vocabulary / 480 + 1) * 2 * d * c
    assert runs["quantum"]["flops_per_token"] == pytest.approx(6 * lifted)


def test_the_planned_tokens_are_those_that_are_seen(finished, tmp_path):
    folder, plan = finished
    bench = bench_of(plan, tmp_path)
    for seed in PLAN["seeds"]:  # 20 steps are an epoch of 18 and two of the next
        planned = sizes_of(bench.run("quantum", seed, {}).settings, bench.dataset)
        assert planned.tokens == record(folder, f"quantum-seed{seed}")["tokens"]


def test_a_trial_is_measured_on_the_choice_half(finished, tmp_path):
    folder, plan = finished
    trial = bench_of(plan, tmp_path).trial("plain", 1)
    run_task(trial)
    (checkpoint,) = trial.settings.output.glob("*epoch_1.pt")
    choice, table = (measure(checkpoint, trial.settings, half, None)["sources"] for half in ("choice", "table"))
    assert record(folder, "search/plain-try1")["sources"] == choice != table


def test_the_best_setting_of_the_choice_half_is_the_one_that_runs(finished):
    folder, _ = finished
    for variant in ("quantum", "plain"):
        trials = [record(folder, f"search/{variant}-try{number}") for number in range(2)]
        assert [trial["half"] for trial in trials] == ["choice"] * 2
        assert [trial["settings"]["max_steps"] for trial in trials] == [5, 5]
        losses = [trial["sources"]["all"]["cross_entropy"] for trial in trials]
        assert losses[1] < losses[0]
        assert record(folder, f"{variant}-seed5")["chosen"] == trials[1]["chosen"]
    report = (folder / "results" / "report.md").read_text()
    assert re.search(r"\| quantum \| table_rate 20 \| \d\.\d{4} \| chosen \|", report)
    assert re.search(r"\| plain \| table_rate 20, learning_rate 1e-06 \| \d\.\d{4} \|  \|", report)


def test_a_variant_that_fails_is_recorded_and_the_others_go_on(finished):
    folder, _ = finished
    run = record(folder, "broken-seed3")
    assert run["status"] == "failed"
    assert "not finite" in run["line"]
    assert run["line"].startswith("step ")
    assert "sources" not in run
    assert f"failed: {run['line']}" in (folder / "results" / "report.md").read_text()


def test_the_report_holds_its_pictures_and_is_made_anew_from_the_jsons(finished, tmp_path):
    folder, plan = finished
    page = (folder / "results" / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 5
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = (folder / "results" / "report.md").read_text()
    losses = [record(folder, f"quantum-seed{s}")["sources"]["all"]["cross_entropy"] for s in (3, 5)]
    assert f"| quantum | all | 2 | {sum(losses) / 2:.4f} ± " in text
    others = [record(folder, f"plain-seed{s}")["sources"]["all"]["cross_entropy"] for s in (3, 5)]
    first, second = (ours - theirs for ours, theirs in zip(losses, others, strict=True))
    pair = rf"\| quantum - plain \| all \| 2 \| {re.escape(f'{(first + second) / 2:+.4f}')} ± \S+( \*)? \| "
    assert re.search(pair + re.escape(f"3: {first:+.4f}, 5: {second:+.4f} |"), text)
    for name in ("report.md", "report.html"):
        (folder / "results" / name).unlink()
    assert indra("ablate", plan, "--output", folder / "results", "--report-only") == 0
    assert (folder / "results" / "report.html").read_text() == page
    assert (folder / "results" / "report.md").read_text() == text


def test_a_finished_plan_runs_nothing_again_and_refuses_other_settings(world, finished, tmp_path, capsys):
    folder, plan = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}
    assert indra("ablate", plan, *folders(folder)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    other = write_plan(world, tmp_path, base=BASE | {"warmup_fraction": 0.5})
    assert indra("ablate", other, *folders(folder)) == 2
    said = capsys.readouterr().err
    assert "must belong to a run with warmup_fraction 0.5, as planned, not 0.05" in said
    assert "quantum-seed3.json" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("quantum", {"d_model": 8}, "must belong to a run with d_model 8, as planned, not 7"),
        ("quantum", {"state_width": 4}, "must belong to a run with state_width 4, as planned, not 6"),
        ("plain", {}, "must belong to a run with a setting of the plan's search, not {'table_rate': 20}"),
    ],
)
def test_a_report_refuses_the_runs_of_another_plan(world, finished, tmp_path, capsys, variant, changes, said):
    """Those of variants that this command does not run, too."""
    folder, _ = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    before = (tmp_path / "results" / "report.md").read_bytes()
    variants = PLAN["variants"] | {variant: PLAN["variants"][variant] | changes}
    grids = PLAN["search"]["variants"] | ({} if changes else {variant: [{"table_rate": 3}]})
    plan = write_plan(world, tmp_path, variants=variants, search=PLAN["search"] | {"variants": grids})
    for options in (("--report-only",), ("--work", tmp_path / "work", "--only", "broken")):
        assert indra("ablate", plan, "--output", tmp_path / "results", *options) == 2
        assert f"{variant}-seed3.json; {said}" in capsys.readouterr().err
    assert (tmp_path / "results" / "report.md").read_bytes() == before


def change(folder, name, **changes):
    """A copy of a finished plan's JSON with other values, those of its settings among them."""
    path = folder / "results" / f"{name}.json"
    content = json.loads(path.read_text())
    settings = content["settings"] | {key: value for key, value in changes.items() if key in content["settings"]}
    content |= {key: value for key, value in changes.items() if key not in settings} | {"settings": settings}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("plain-seed5", {"data": "other"}, "data .*, as the others, not other"),
        ("search/plain-try0", {"data": "other"}, "data .*, as the others, not other"),
        ("plain-seed3", {"readouts_measured_with": "other"}, "readouts_measured_with .*, as the others, not other"),
        ("quantum-seed5", {"signals": "other"}, "signals of quantum .*, as the others, not other"),
        ("quantum-seed5", {"tail": "bucket"}, "tail of quantum none, as the others, not bucket"),
        ("quantum-seed5", {"softmax": "sampled"}, "softmax of quantum exact, as the others, not sampled"),
        ("quantum-seed5", {"strategy": "stage1"}, "strategy v4-unified, as planned, not stage1"),
        ("quantum-seed5", {"half": "choice"}, "half table, as planned, not choice"),
        ("quantum-seed5", {"seed": 3}, "seed 5, as planned, not 3"),
        (
            "quantum-seed5",
            {"chosen": {"table_rate": 1}, "table_rate": 1.0},
            r"chosen of quantum {'table_rate': 20}, as the others, not {'table_rate': 1}",
        ),
        ("search/plain-try1", {"weight_decay": 3.0}, r"weight_decay 0\.3, as planned, not 3\.0"),
        (
            "search/plain-try1",
            {"chosen": {"table_rate": 7}},
            r"chosen {'table_rate': 20}, as planned, not {'table_rate': 7}",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(finished, tmp_path, capsys, name, changes, said):
    """By the report, and before hours are spent on a variant beside them."""
    folder, plan = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    change(tmp_path, name, **changes)
    (tmp_path / "results" / "broken-seed3.json").unlink()
    for options in (("--report-only",), ("--work", tmp_path / "work", "--only", "broken")):
        assert indra("ablate", plan, "--output", tmp_path / "results", *options) == 2
        assert re.search(
            rf"results: got \S*{name}\.json; must belong to a run with {said}; remove it", capsys.readouterr().err
        )
    assert not (tmp_path / "results" / "broken-seed3.json").exists()


def test_other_data_are_refused_before_anything_runs(world, finished, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    (tmp_path / "results" / "broken-seed3.json").unlink()
    for path in tmp_path.glob("results/*.json"):
        change(tmp_path, path.stem, data="other")
    plan = write_plan(world, tmp_path)
    assert indra("ablate", plan, *folders(tmp_path), "--only", "broken") == 2
    assert "as the others, not other" in capsys.readouterr().err
    assert not (tmp_path / "results" / "broken-seed3.json").exists()


def test_checkpoints_that_were_to_be_kept_are_kept_by_the_next_command(world, tmp_path, no_pictures):
    plan = write_plan(world, tmp_path, seeds=[3], search=None, base=BASE | {"max_steps": 2})
    for options in (("--keep-checkpoints",), ()):
        assert indra("ablate", plan, *folders(tmp_path), "--only", "plain", *options) == 0
        assert list((tmp_path / "work").rglob("*.pt"))


def test_a_run_that_resumes_must_be_the_planned_one(world, tmp_path, capsys, no_pictures):
    """It keeps some options of its checkpoint that it is not given, and its JSON would not say so."""
    base, changes = BASE | {"max_steps": 2}, {"seeds": [3], "search": None}
    plan = write_plan(world, tmp_path, base=base | {"table_rate": 50}, **changes)
    command = ("ablate", plan, *folders(tmp_path), "--only", "plain", "--keep-checkpoints")
    assert indra(*command) == 0
    written = tmp_path / "results" / "plain-seed3.json"
    written.unlink()
    write_plan(world, tmp_path, base=base, **changes)
    capsys.readouterr()
    assert indra(*command) == 2
    said = r"--work: got \S*plain-seed3; must hold a run with table_rate 10\.0, not 50\.0; remove it"
    assert re.search(said, capsys.readouterr().err)
    assert not written.exists()
    shutil.rmtree(tmp_path / "work" / "plain-seed3")
    assert indra(*command) == 0
    assert record(tmp_path, "plain-seed3")["settings"]["table_rate"] == 10


def test_a_run_says_how_it_was_computed(finished, tmp_path, no_pictures):
    folder, plan = finished
    run = record(folder, "plain-seed3")
    assert run["settings"]["precision"] == "auto"
    assert run["computed_by"] == {
        "precision": "float32", "objective_precision": "float32", "attention_precision": "layers", "row_order": ORDER,
        "products": os.environ["INDRA_PRODUCTS"],
    }  # fmt: skip
    text = (folder / "results" / "report.md").read_text()
    assert "computed by: precision float32, objective_precision float32, attention_precision layers, " in text
    assert "not all computed alike" not in text
    shutil.copytree(folder / "results", tmp_path / "results")
    change(tmp_path, "plain-seed5", computed_by=run["computed_by"] | {"precision": "bfloat16"})
    older = record(tmp_path, "quantum-seed3")
    del older["computed_by"]
    (tmp_path / "results" / "quantum-seed3.json").write_text(json.dumps(older))
    assert indra("ablate", plan, "--output", tmp_path / "results", "--report-only") == 0
    said = "not all computed alike: precision float32 in quantum-seed5, plain-seed3 and bfloat16 in plain-seed5."
    assert said in (tmp_path / "results" / "report.md").read_text()


def test_the_work_of_a_step_is_that_of_whole_rows(finished, tmp_path):
    """A row has 48 positions."""
    _, plan = finished
    bench = bench_of(plan, tmp_path)
    settings = bench.run("quantum", 3, {}).settings

    def work(batch_tokens, projector="quantum"):
        changed = settings.model_copy(update={"batch_tokens": batch_tokens, "projector": projector})
        return sizes_of(changed, bench.dataset).flops_per_token

    assert work(480) == work(527) > work(528)
    assert work(7) == work(48)
    # A frozen projector has no gradients of its weights, which are a third of its work.
    of_the_table = [work(48, projector) - work(480, projector) for projector in ("quantum", "frozen")]
    assert of_the_table[1] == pytest.approx(of_the_table[0] * 4 / 6)


def test_a_run_that_is_killed_is_said_to_be(world, tmp_path, capsys, monkeypatch):
    plan = write_plan(world, tmp_path, seeds=[3], search=None)
    monkeypatch.setattr(processes, "_run_here", killed)
    assert indra("ablate", plan, *folders(tmp_path), "--only", "plain") == 2
    assert (
        "1 runs have no result; the first of them: plain-seed3: not finished (killed by signal 9)"
        in capsys.readouterr().err
    )


def killed(task):
    """Do what the kernel does when memory runs out. It is a module's function, so that another process can call it."""
    log = processes.log_path(task)
    log.parent.mkdir(parents=True)
    log.write_text("wrote a checkpoint\n")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("options", [("--only", "plain"), ("--dry-run",)])
def test_a_report_alone_is_of_all_and_is_written(finished, capsys, options):
    folder, plan = finished
    assert indra("ablate", plan, *folders(folder), "--report-only", *options) == 2
    assert f"{options[0]}: got given; must not be given together with --report-only" in capsys.readouterr().err


def test_a_report_that_finds_no_room_leaves_the_pictures_of_before(finished, tmp_path, capsys, monkeypatch):
    folder, plan = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    before = {path.name: path.read_bytes() for path in (tmp_path / "results").glob("report*")}

    def half_of(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Figure, "savefig", half_of)
    assert indra("ablate", plan, "--output", tmp_path / "results", "--report-only") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "got No space left on device; must be on a writable disk with free space" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").glob("*report*")} == before


def test_the_figures_are_those_of_the_checkpoint_on_half_of_the_documents(world, finished, tmp_path, monkeypatch):
    """In this process, with the checkpoint kept: the same bytes, and the two halves make the whole."""
    folder, plan = finished
    bench = bench_of(plan, tmp_path)
    task = bench.run("quantum", 3, {"table_rate": 20})
    run_task(task)
    assert without_timing(task.result) == without_timing(folder / "results" / "quantum-seed3.json")
    checkpoint = next(task.settings.output.glob("*epoch_2.pt"))
    halves = [measure(checkpoint, task.settings, half, world.signals) for half in ("choice", "table")]
    whole = evaluate_checkpoint(checkpoint, EvalSettings(data=world.data, signals=world.signals))
    for source, figures in whole.sources.items():
        parts = [half["sources"][source] for half in halves]
        assert sum(part["tokens"] for part in parts) == figures.tokens
        total = sum(part["tokens"] * part["cross_entropy"] for part in parts)
        assert total / figures.tokens == pytest.approx(figures.cross_entropy)
    instruction = {"instruction": "Translate the sentence into French.", "input": "The cat sleeps."}
    written = write_text(checkpoint, TestSettings(**instruction)).text
    assert halves[1]["samples"]["texts"][-1] == written == record(folder, "quantum-seed3")["samples"]["texts"][-1]
    assert halves[1]["sources"] == record(folder, "quantum-seed3")["sources"]
    assert sum(half["alignment"]["positions"] for half in halves) == whole.alignment.positions


def test_a_run_that_could_not_be_done_leaves_no_json_and_does_not_stop_the_others(world, tmp_path, capsys, no_pictures):
    signals = tmp_path / "signals"
    shutil.copytree(world.signals, signals)
    shard = next(signals.glob("train-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    base = BASE | {"max_steps": 2}
    plan = write_plan(world, tmp_path, signals=str(signals), seeds=[3], search=None, base=base)
    assert indra("ablate", plan, *folders(tmp_path), "--only", "quantum", "--only", "plain") == 2
    said = capsys.readouterr().err
    assert "1 runs have no result; the first of them: quantum-seed3: not finished" in said
    assert "must have sha256" in said
    assert sorted(path.name for path in (tmp_path / "results").glob("*.json")) == ["plain-seed3.json"]
    assert "1 of 3 runs are done" in (tmp_path / "results" / "report.md").read_text()


def test_a_second_ablation_on_the_same_work_is_refused(finished, capsys):
    folder, plan = finished
    with FileLock(folder / "work" / ".lock"):
        assert indra("ablate", plan, *folders(folder)) == 2
    assert "is in use by another run" in capsys.readouterr().err


def test_a_long_run_keeps_all_held_out_figures_and_some_looks_for_collapse(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(0, 4001, 20):
        held_out = {"all": 5.0} if step % 800 == 0 else None
        kinds = ["phase_rise"] if step == 2140 else None
        log.write({"step": step, "tokens": 10 * step, "held_out": held_out, "effective_rank": 3.0, "collapse": kinds})
    log.close()
    kept = curve(tmp_path / "metrics.jsonl")
    assert 50 <= len(kept) <= 60
    assert [line["step"] for line in kept if line["held_out"]] == [0, 800, 1600, 2400, 3200, 4000]
    assert [line["step"] for line in kept if line["collapse"]] == [2140]


def test_a_json_of_before_an_option_came_counts_at_its_default(finished):
    folder, _ = finished
    path = folder / "results" / "plain-seed3.json"
    now, before = record(folder, "plain-seed3"), record(folder, "plain-seed3")
    planned = {name: now[name] for name in ("variant", "half", "chosen", "readouts_measured_with", "settings")}
    del before["settings"]["dropout"]
    check_result(path, before, planned)
    with pytest.raises(UserError, match=r"dropout 0\.1, as planned, not 0\.0"):
        check_result(path, before, {**planned, "settings": planned["settings"] | {"dropout": 0.1}})
    del before["settings"]["tail"]
    check_result(path, before, planned)
    with pytest.raises(UserError, match="tail bucket, as planned, not none"):  # its default now, but not then
        check_result(path, before, {**planned, "settings": planned["settings"] | {"tail": "bucket"}})
    before["settings"]["gone"] = 3
    with pytest.raises(UserError, match="gone None, as planned, not 3"):
        check_result(path, before, planned)


def test_unequal_tokens_are_told(finished, tmp_path, no_pictures):
    folder, plan = finished
    runs = {name: {3: record(folder, f"{name}-seed3")} for name in ("quantum", "plain")}
    assert "NOT AT EQUAL" not in markdown(report_blocks(load_plan(plan), tmp_path, runs, runs, {}))
    tokens = runs["quantum"][3]["tokens"]
    for part, told in (
        (0.0005, "The rows are equally many, but not equally full"),
        (0.002, "NOT AT EQUAL TOKENS: seeds 3"),
    ):
        runs["plain"][3]["tokens"] = round(tokens * (1 + part))
        said = markdown(report_blocks(load_plan(plan), tmp_path, runs, runs, {}))
        assert f"{told}: tokens differ by up to {round(tokens * (1 + part)) / tokens - 1:.3%}." in said
    unequal = load_plan(plan).model_copy(update={"equal_rows": False})
    said = markdown(report_blocks(unequal, tmp_path, runs, runs, {}))
    assert "NOT AT EQUAL" not in said
    assert "different numbers of rows, as the plan says" in said


@pytest.mark.parametrize(
    ("owner", "name", "when", "occurrence"),
    [
        (loop, "take_step", "after", 19),  # after the checkpoint of the first epoch, which has 17 steps
        (one_run, "measure", "before", 1),
        (results, "write_json", "before", 1),
        (one_run, "drop_checkpoints", "before", 1),
    ],
)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(
    finished, tmp_path, no_pictures, owner, name, when, occurrence
):
    folder, plan = finished

    def killed():
        survival.at(owner, name, when, occurrence, survival.die)
        run_task(bench_of(plan, tmp_path, keep=False).run("plain", 5, {"table_rate": 20}))

    assert survival.in_fork(killed) == -signal.SIGKILL
    written = (tmp_path / "results" / "plain-seed5.json").exists()
    assert written == (name == "drop_checkpoints")
    assert list((tmp_path / "work" / "plain-seed5").glob("*.pt"))
    command = ("ablate", plan, "--only", "plain", *folders(tmp_path))
    shutil.copytree(folder / "results" / "search", tmp_path / "results" / "search", dirs_exist_ok=True)
    shutil.copy(folder / "results" / "plain-seed3.json", tmp_path / "results")
    assert indra(*command) == 0
    expected = folder / "results" / "plain-seed5.json"
    assert without_timing(tmp_path / "results" / "plain-seed5.json") == without_timing(expected)
    assert not list((tmp_path / "work").rglob("*.pt"))
    output = tmp_path / "work" / "logs" / "plain-seed5" / "output.txt"
    if name == "take_step":
        assert "Resuming from step 17 of 20." in output.read_text()
    if name == "measure":  # this process did none of the training
        assert record(tmp_path, "plain-seed5")["timing"]["peak_memory_bytes"] is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_plan_that_is_stopped_goes_on_to_the_same_bytes(world, finished, tmp_path, number):
    _, steps = finished, 150
    plan = write_plan(world, tmp_path, base=BASE | {"max_steps": steps, "epochs": 99}, seeds=[3], search=None)
    command = [sys.executable, "-m", "indraquantum.cli", "ablate", plan, "--only", "plain", *folders(tmp_path)]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics = tmp_path / "work" / "logs" / "plain-seed3" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        time.sleep(0.005)
    if number == signal.SIGHUP:  # a terminal that closes sends it to all of its processes
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait() == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
    assert indra(*command[3:]) == 0
    said = (tmp_path / "work" / "logs" / "plain-seed3" / "output.txt").read_text()
    assert re.search(rf"Stopped at step \d+ by SIGTERM.*Resuming from step \d+ of {steps}", said, re.DOTALL)
    undisturbed = bench_of(plan, tmp_path / "undisturbed").run("plain", 3, {})
    run_task(undisturbed)
    assert without_timing(undisturbed.result) == without_timing(tmp_path / "results" / "plain-seed3.json")


@pytest.mark.parametrize(("name", "value"), [("settings", []), ("chosen", "x"), ("status", "done"), ("status", {})])
def test_a_result_of_wrong_kinds_is_one_line(finished, tmp_path, name, value):
    folder, _ = finished
    run = record(folder, "plain-seed3")
    results.write_result(tmp_path / "a-seed0.json", run)
    assert results.read_result(tmp_path / "a-seed0.json") == run
    results.write_result(tmp_path / "a-seed0.json", {**run, name: value})
    with pytest.raises(UserError, match=rf"results: got .*a-seed0\.json; is damaged: its {name} must be"):
        results.read_result(tmp_path / "a-seed0.json")


@pytest.mark.parametrize("name", ["settings data", "settings signals", "readouts_measured_with", "sources", "timing"])
def test_a_result_that_lacks_something_is_one_line(finished, tmp_path, name):
    folder, plan = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    *inside, last = name.split()
    content = record(tmp_path, "plain-seed3")
    del (content["settings"] if inside else content)[last]
    (tmp_path / "results" / "plain-seed3.json").write_text(json.dumps(content))
    what = "its settings" if inside else "it"
    with pytest.raises(UserError, match=rf"results: got .*plain-seed3\.json; is damaged: {what} must have {last}$"):
        results.read_results(load_plan(plan), tmp_path / "results")


def test_all_damaged_results_are_named_at_once(tmp_path):
    plan = Plan(name="p", data=tmp_path, variants={"a": {}, "b": {}}, seeds=(0, 1))
    for name in ("a-seed1", "b-seed0"):
        (tmp_path / f"{name}.json").write_text("{")
    with pytest.raises(
        UserError, match=r"results: got .*a-seed1\.json; must be JSON .*\. results: got .*b-seed0\.json"
    ):
        results.read_results(plan, tmp_path)
