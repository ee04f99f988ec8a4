"""Plans: what is refused before anything runs; the shipped ones run, and the runs kept in results are theirs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from indraquantum.ablation import tasks
from indraquantum.ablation.blocks import markdown
from indraquantum.ablation.one_run import run_task
from indraquantum.ablation.plan import load_plan, resolved
from indraquantum.ablation.report import report_blocks
from indraquantum.ablation.tasks import Bench
from indraquantum.config import AblateSettings
from indraquantum.errors import UserError
from indraquantum.inference import samples
from indraquantum.training.earlier import with_defaults
from test_ablation import BASE, folders, indra, write_plan

OF_THE_DATA = ("data", "signals", "start_from", "stages")  # in a record by their hashes


def test_a_dry_run_lists_the_variants_and_writes_nothing(world, tmp_path, capsys):
    plan = write_plan(world, tmp_path)
    assert indra("ablate", plan, *folders(tmp_path), "--dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:4]] == ["quantum", "plain", "broken"]
    assert lines[2][1] == "3,697"
    assert lines[2][-4:] == ["20", lines[1][-3], "2", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"]


@pytest.mark.parametrize(
    ("changes", "field", "value", "allowed"),
    [
        ({"variant": {}}, "variant", "", "there is no such setting"),
        ({"variants": {}}, "variants", "{}", "at least 1"),
        ({"variants": {"a b": {}}}, "variants.a b.[key]", "a b", "match pattern"),
        ({"variants": {"a": {"d_modl": 3}}}, "variants.a.d_modl", "3", "must be an option of a run: batch_tokens"),
        ({"variants": {"a": {"seed": 3}}}, "variants.a.seed", "3", "must be an option of a run"),
        ({"base": {"patience": 3}}, "base.patience", "3", "must be an option of a run"),
        ({"variants": {"a": {"d_model": 1}}}, "variants.a: d_model", "1", "greater than or equal to 2"),
        (
            {"variants": {"a": {"heads": 5, "state_width": 6}}, "pairs": []},
            "variants.a: --heads",
            "5",
            "must divide the width",
        ),
        ({"base": {"output": "x"}}, "base.output", "x", "must be an option of a run"),
        ({"seeds": [1, 1]}, "seeds", "[1, 1]", "must all be different"),
        ({"seeds": []}, "seeds", "[]", "at least 1"),
        ({"pairs": [["quantum", "nobody"]]}, "pairs", "nobody", "one of the variants quantum, plain, broken"),
        ({"search": {"grid": [{}] * 7}}, "search.grid", "", "at most 6"),
        ({"search": {"grid": [{"d_model": 7}]}}, "search.grid.d_model", "7", "because variants.quantum sets it"),
        ({"search": {"fraction": 0}}, "search.fraction", "0", "greater than 0"),
        ({"equal_parameters": [["quantum", "plain"]]}, "equal_parameters", "quantum plain", "plain 3,697"),
        ({"variants": {"a": {}, "b": {"max_steps": 19}}}, "variants", "b", "as many rows as variant a (200), not 190"),
        ({"variants": {"a": {"projector": "none", "residual": True}}}, "variants.a: --residual", "true", "left out"),
        ({"signals": None}, "variants.quantum.signals", "none", "or set no_teacher: true"),
        ({"data": "nowhere"}, "--data", "nowhere", "does not exist"),
    ],
)
def test_a_bad_plan_is_one_line(world, tmp_path, capsys, changes, field, value, allowed):
    if "variants" in changes:
        changes = {"pairs": [], "search": None} | changes
    if changes.get("search"):
        changes["variants"] = {"quantum": {"d_model": 6}}
        changes["pairs"] = []
    plan = write_plan(world, tmp_path, **changes)
    assert indra("ablate", plan, *folders(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{field}: got " in error
    assert value in error
    assert allowed in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"]


def test_a_plan_at_equal_time_may_have_other_lengths(world, tmp_path, capsys):
    variants = {"a": {}, "b": {"max_steps": 19}}
    plan = write_plan(world, tmp_path, variants=variants, pairs=[], search=None, equal_rows=False)
    assert indra("ablate", plan, *folders(tmp_path), "--dry-run") == 0
    assert {"19", "20"} <= set(capsys.readouterr().out.split())


def test_a_search_may_choose_the_sizes_within_a_budget(world, tmp_path, capsys):
    """Only the settings of the search fit the budget; the default width alone costs more."""
    plan = write_plan(
        world, tmp_path, base={"layers": 1, "batch_tokens": 480, "max_steps": 20, "no_teacher": True}, pairs=[],
        variants={"plain": {"projector": "none", "heads": 1}}, budgets={"plain": {"parameters": 4000}},
        search={"grid": [{"d_model": 8}, {"d_model": 6}, {"d_model": 8, "learning_rate": 0.01}]},
    )  # fmt: skip
    assert indra("ablate", plan, *folders(tmp_path), "--dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["plain", "plain"]
    assert len({line[3] for line in lines[1:3]}) == 2  # the share of the table
    assert lines[1][-2:] == ["2", "2"]  # trials of this size, and the runs
    assert lines[2][-1] == "1"


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "must be YAML"), ("- a", "must hold name, data and variants"), ("name: a\nname: b", "is given twice")],
)
def test_a_file_that_is_no_plan_is_one_line(tmp_path, capsys, text, said):
    (tmp_path / "plan.yaml").write_text(text)
    assert indra("ablate", tmp_path / "plan.yaml") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("setting", "field", "said"),
    [
        ({"max_steps": 19}, "variants", "got plain; must train on as many rows as variant quantum (200), not 190"),
        ({"mlp_width": 40}, "equal_parameters", "must agree within 1 %: quantum 3,697, plain 3,697 or 4,129"),
    ],
)
def test_what_a_search_may_choose_is_as_fair(world, tmp_path, capsys, setting, field, said):
    usual = {name: BASE[name] for name in setting}
    variant = {"projector": "none", "d_model": 8}
    variants = {"quantum": variant | usual, "plain": variant}
    search = {"variants": {"plain": [usual, setting]}}
    base = {name: value for name, value in BASE.items() if name not in setting}
    plan = write_plan(
        world, tmp_path, base=base, variants=variants, search=search, pairs=[], equal_parameters=[["quantum", "plain"]]
    )
    assert indra("ablate", plan, *folders(tmp_path), "--dry-run") == 2
    assert f"{field}: " in (error := capsys.readouterr().err)
    assert said in error


def test_a_search_needs_stages_that_it_can_shorten(world, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("stages: [{name: a, steps: 6}]")
    base = {name: value for name, value in BASE.items() if name != "max_steps"}
    variants = {"own": {"projector": "none", "d_model": 8, "strategy": "own.yaml"}}
    search = {"grid": [{"table_rate": 1}, {"table_rate": 2}]}
    plan = write_plan(world, tmp_path, base=base, variants=variants, pairs=[], search=search)
    assert indra("ablate", plan, *folders(tmp_path), "--dry-run") == 2
    assert re.search(r"variants\.own\.strategy: got \S*own\.yaml; must have stages given as", capsys.readouterr().err)


def test_a_plan_needs_the_packed_folder(world, tmp_path, capsys):
    plan = write_plan(world, tmp_path)
    assert indra("ablate", plan, *folders(tmp_path), "--data", world.pickle, "--dry-run") == 2
    assert re.search(r"--data: got \S*mixed\.pkl; must be the packed folder", capsys.readouterr().err)


def test_a_search_needs_something_held_out_to_choose_by(world, tmp_path, capsys, monkeypatch):
    plan = write_plan(world, tmp_path)
    monkeypatch.setattr(tasks, "documents_of_half", lambda dataset, half: np.array([half == "table"]))
    assert indra("ablate", plan, *folders(tmp_path)) == 2
    assert (
        "must hold out at least two different documents of a source, because the plan has a search"
        in capsys.readouterr().err
    )
    plan = write_plan(world, tmp_path, search=None)
    assert indra("ablate", plan, *folders(tmp_path), "--dry-run") == 0


IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b")


@pytest.fixture
def git_without_settings(monkeypatch):
    """git as if nobody had configured it, and not called by a hook, which sets variables."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def test_a_change_anywhere_in_the_program_marks_the_commit(tmp_path, monkeypatch, git_without_settings):
    package = tmp_path / "package"
    for file in (package / "__init__.py", package / "ablation" / "tasks.py", package / "model" / "head.py"):
        file.parent.mkdir(parents=True)
        file.write_text("")
    for command in (("init", "-q"), ("add", "."), (*IDENTITY, "commit", "-qm", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(tasks, "__file__", str(package / "ablation" / "tasks.py"))
    head = tasks.commit()
    assert len(head) == 40
    (package / "model" / "head.py").write_text("changed")
    assert tasks.commit() == f"{head}+changes"
    other = tmp_path / "other"
    other.mkdir()
    for command in (("init", "-q"), (*IDENTITY, "commit", "-qm", "other", "--allow-empty")):
        subprocess.run(["git", *command], cwd=other, check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert tasks.commit() == f"{head}+changes"


def test_a_package_within_a_repository_that_does_not_track_it_has_no_commit(
    tmp_path, monkeypatch, git_without_settings
):
    installed = tmp_path / ".venv" / "package"
    (installed / "ablation").mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    for command in (("init", "-q"), ("add", "."), (*IDENTITY, "commit", "-qm", "of the user")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(tasks, "__file__", str(installed / "ablation" / "tasks.py"))
    assert tasks.commit() is None


def test_anchors_and_paths_beside_the_plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "name: a\ndata: up/data\nsignals: ../s\nbase: &shared {learning_rate: 1e-3, signals: null}\n"
        "variants:\n  x: {<<: *shared, signals: other}\n  y: {}\n"
    )
    plan = load_plan(tmp_path / "plan.yaml")
    assert (plan.data, plan.signals) == (tmp_path / "up" / "data", tmp_path / ".." / "s")
    assert plan.variants["x"] == {"learning_rate": "1e-3", "signals": str(tmp_path / "other")}
    settings = resolved(plan, "x", {"table_rate": 3}, data=plan.data, signals=plan.signals, seed=4)
    assert (settings.learning_rate, settings.table_rate, settings.seed) == (1e-3, 3, 4)
    assert settings.signals == tmp_path / "other"
    assert resolved(plan, "y", {}, data=plan.data, signals=plan.signals).signals is None


def test_names_and_settings_of_a_plan_may_look_like_numbers(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "name: 1e5\ndata: d\nvariants: {1e-3: {learning_rate: 1e-3}, 2e-3: {}}\npairs: [[1e-3, 2e-3]]\n"
        "search: {grid: [{table_rate: '2e1'}]}"
    )
    plan = load_plan(tmp_path / "plan.yaml")
    assert (plan.name, list(plan.variants)) == ("1e5", ["1e-3", "2e-3"])
    settings = resolved(plan, "1e-3", plan.grid_of("1e-3")[0], data=plan.data)
    assert (settings.learning_rate, settings.table_rate) == (1e-3, 20.0)


def test_a_search_finds_a_strategy_beside_the_plan_and_records_its_name(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "name: a\ndata: d\nvariants: {x: {}}\nsearch: {grid: [{strategy: good.yaml}, {strategy: v5}]}"
    )
    plan = load_plan(tmp_path / "plan.yaml")
    found = [resolved(plan, "x", chosen, data=plan.data).strategy for chosen in plan.grid_of("x")]
    assert found == [str(tmp_path / "good.yaml"), "v5"]
    assert plan.grid_of("x") == ({"strategy": "good.yaml"}, {"strategy": "v5"})  # what results record


def test_a_strategy_may_be_what_is_compared(world, tmp_path, no_pictures):
    own = "stages: [{name: a, fraction: 0.5}, {name: b, fraction: 0.5, sources: [alpaca]}]"
    (tmp_path / "mine.yaml").write_text(own)
    variants = {
        "gentle": {"strategy": "stage2-v3-gentle"},
        "mine": {"strategy": "mine.yaml"},
        "ce": {"no_teacher": True},
    }
    base = {**BASE, "d_model": 6, "max_steps": 6, "evaluate_every": 2}
    plan = load_plan(write_plan(world, tmp_path, pairs=[], search=None, base=base, variants=variants))
    bench = Bench(plan, AblateSettings(), tmp_path / "results", tmp_path / "work", "")
    bench.check()
    runs = {}
    for variant in variants:
        task = bench.run(variant, 3, {})
        run_task(task)
        runs[variant] = {3: task.record()}
    gentle, mine = runs["gentle"][3], runs["mine"][3]
    assert [record["steps"] for record in (gentle, mine)] == [6, 6]
    assert list(gentle["settings"]["stages"]) == ["stage1", "stage2-v3"]
    assert (mine["settings"]["strategy"], list(mine["settings"]["stages"])) == ("mine.yaml", ["a", "b"])
    assert "stages" not in runs["ce"][3]["settings"]  # as in records from before there were any
    curve = {line["step"]: line for line in gentle["curve"]}
    assert [curve[step]["stage"] for step in (2, 3, 4, 6)] == ["stage1", "stage1", "stage2-v3", "stage2-v3"]
    rise = curve[6]["held_out"]["wikitext"] - curve[3]["held_out"]["wikitext"]
    text = markdown(report_blocks(plan, tmp_path / "results", runs, runs, {}))
    assert f"| gentle | stage2-v3 | wikitext | {curve[6]['held_out']['wikitext']:.4f} | {rise:+.4f} |" in text
    assert f"| gentle | stage1 | wikitext | {curve[3]['held_out']['wikitext']:.4f} |  |" in text
    assert "| ce | unified" not in text  # a single stage can't show forgetting


def test_signals_are_needed_only_by_strategies_that_ask_the_teacher(world, tmp_path):
    variants = {"stage1": {"strategy": "stage1"}, "gentle": {"strategy": "stage2-v3-gentle"}}
    plan = load_plan(write_plan(world, tmp_path, pairs=[], search=None, signals=None, variants=variants))
    bench = Bench(plan, AblateSettings(), tmp_path / "results", tmp_path / "work", "")
    assert bench.run("stage1", 3, {}).planned["settings"]["signals"] is None
    with pytest.raises(UserError, match=r"variants\.gentle\.signals: got none; must be given"):
        bench.run("gentle", 3, {})


def test_the_shipped_plans_run(world, root, tmp_path, monkeypatch):
    """Every plan of configs/ablations, at toy size, two steps; of variants apart in numbers above 0 alone the first."""
    short = samples.SETTINGS.model_copy(update={"max_new_tokens": 2})
    monkeypatch.setattr(samples, "SETTINGS", short)
    kinds = set()
    for path in sorted((root / "configs" / "ablations").glob("*.yaml")):
        plan = load_plan(path)
        toy = {"data": world.data, "signals": world.signals, "base": plan.base | {"layers": 1}}
        short_ones = {name: own | {"max_steps": 2} for name, own in plan.variants.items()}
        signals = {"signals": str(world.signals)}
        variants = {name: own | signals if "signals" in own else own for name, own in short_ones.items()}
        at_own_size = {"equal_parameters": (), "equal_work": (), "budgets": {}}
        small = plan.model_copy(update={**toy, "variants": variants, **at_own_size})
        bench = Bench(small, AblateSettings(), tmp_path / path.stem / "results", tmp_path / path.stem, "")
        bench.check()
        for variant in plan.variants:
            task = bench.run(variant, plan.seeds[0], {})
            options = task.settings.model_dump(mode="json", exclude={"output", "logs"})
            # A number that is zero turns something off.
            kind = tuple(bool(value) if isinstance(value, int | float) else value for value in options.values())
            if kind not in kinds:
                kinds.add(kind)
                run_task(task)
                assert (task.record()["status"], task.record()["steps"]) == ("finished", 2)
    assert len(kinds) >= 30


def test_the_runs_in_results_are_of_the_shipped_plans(root):
    """No default may change what a recorded run was: plans state all in which their variants differ from today's."""
    checked = 0
    for path in sorted((root / "configs" / "ablations").glob("*.yaml")):
        plan = load_plan(path)
        for run in sorted((root / "results" / path.stem).rglob("*.json")):
            record = json.loads(run.read_text())
            settings = resolved(plan, record["variant"], record["chosen"], data=plan.data, seed=record["seed"])
            planned = json.loads(settings.model_dump_json()) | {"strategy": Path(settings.strategy).name}
            planned |= settings.decided()
            if record["variant"] in plan.budgets:  # chose the width
                planned["mlp_width"] = record["settings"]["mlp_width"]
            if record["half"] == "choice":
                planned["max_steps"] = record["settings"]["max_steps"]
            has = with_defaults(record["settings"], [])
            ours = {name: value for name, value in has.items() if name not in OF_THE_DATA}
            if planned["tail"] == "auto":  # the signals decided
                assert ours.pop("tail", "none") in ("none", "bucket")
            else:
                ours.setdefault("tail", "none")
            assert {name: planned[name] for name in ours} == ours, run
            checked += 1
    assert checked > 100
