"""Families of models at several sizes: the front, hypervolumes and effective sizes, by hand and in a report."""

from __future__ import annotations

import json
import math
import re

import pytest

from indraquantum.ablation import plots
from indraquantum.ablation.front import (
    Point,
    at_equal_seeds,
    compared,
    curves,
    effective_size,
    hypervolume,
    hypervolumes,
    lead,
    loss_at,
    mean_point,
    on_front,
    trend,
)
from indraquantum.ablation.plan import load_plan
from indraquantum.ablation.sizes import sizes_of
from indraquantum.ablation.tasks import Bench
from indraquantum.config import AblateSettings
from indraquantum.training.run import trial_run
from test_ablation import BASE, folders, indra, write_plan


def test_the_front_holds_what_no_other_dominates():
    points = {"a": Point(1, 5.0), "b": Point(2, 4.0), "c": Point(2, 4.5), "d": Point(3, 4.0), "e": Point(5, 3.0)}
    assert on_front(points) == ["a", "b", "e"]
    assert on_front({"a": Point(1, 5.0), "twin": Point(1, 5.0)}) == ["a", "twin"]


def test_a_hypervolume_by_hand():
    # Sizes 1, 10, 100: 0.5 nats below the worst on the first decade, 2 on the second.
    assert hypervolume([Point(1, 4.5), Point(10, 3.0)], 1, 100, 5.0) == pytest.approx((0.5 + 2) / 2)
    # A larger model that is worse adds nothing, and a family without small models gains nothing there.
    assert hypervolume([Point(10, 3.0), Point(31, 4.0)], 1, 100, 5.0) == pytest.approx(1.0)


def test_the_size_of_an_equally_good_model():
    baseline = [Point(1, 5.0), Point(100, 4.0), Point(1000, 4.0)]
    assert effective_size(Point(7, 4.5), baseline) == pytest.approx(10)
    assert effective_size(Point(7, 4.25), baseline) == pytest.approx(100**0.75)
    assert effective_size(Point(7, 5.1), baseline) is None
    assert effective_size(Point(7, 3.9), baseline) is None
    # The model of size 2 is worse than a smaller one, so it says nothing about the size that a loss needs.
    uneven = [Point(1, 4.0), Point(2, 4.2), Point(4, 3.9)]
    assert effective_size(Point(1, 4.1), uneven) is None
    assert effective_size(Point(1, 3.95), uneven) == pytest.approx(2)


def test_the_front_compares_the_seeds_that_all_share():
    runs = {"plain": {0: record(10, 4.50), 1: record(10, 4.60)}, "signed": {0: record(10, 4.52)}}
    equal = at_equal_seeds(("plain", "signed", "unfinished"), runs)
    assert on_front({name: mean_point(by_seed, "parameters") for name, by_seed in equal.items()}) == ["plain"]
    assert at_equal_seeds(("plain", "other"), runs | {"other": {7: record(10, 4.0)}}) == {}


def record(parameters: int, loss: float) -> dict:
    return {"parameters": parameters, "sources": {"all": {"cross_entropy": loss}}}


def test_families_are_compared_at_equal_seeds():
    runs = {
        "small": {0: record(10, 5.0), 1: record(10, 5.2), 2: record(10, 5.1)},
        "large": {0: record(1000, 4.0), 1: record(1000, 4.2)},
        "ours": {0: record(100, 4.25), 1: record(100, 4.2)},
    }
    found = curves({"plain": ("large", "small"), "ours": ("ours",)}, runs, "parameters")
    assert found["plain"] == {0: [(10, 5.0), (1000, 4.0)], 1: [(10, 5.2), (1000, 4.2)]}
    # The worst loss is 5.2. Plain gains 0.2 and 0 from size 10 on, 1.2 and 1.0 from 1000 to 2000; ours 0.95 and 1.0
    # from 100 to 2000.
    plain = [(0.2 * math.log(100) + 1.2 * math.log(2)), 1.0 * math.log(2)]
    ours = [0.95 * math.log(20), 1.0 * math.log(20)]
    ahead = lead(hypervolumes(found), "ours", "plain")
    assert ahead.mean == pytest.approx((sum(ours) - sum(plain)) / 2 / math.log(200))
    assert ahead.count == 2
    (model,) = compared(found, "ours", "plain")
    assert model.size == 100
    assert model.ratios == [pytest.approx(10 * 100**0.75 / 100), pytest.approx(10)]
    assert model.differences == [pytest.approx(4.25 - 4.5), pytest.approx(4.2 - 4.7)]
    assert trend([model]) is None  # one size has no trend
    alone = hypervolumes(curves({"one": ("ours",)}, runs, "parameters"))
    assert alone == {"one": {0: 0.0, 1: pytest.approx(0.05)}}  # at one size, the loss alone counts


def test_the_loss_of_a_baseline_model_of_equal_size():
    baseline = [Point(10, 5.0), Point(1000, 4.0), Point(1000, 4.5)]
    assert loss_at(100, baseline) == pytest.approx(4.5)
    assert loss_at(1000, baseline) == loss_at(1009, baseline) == 4.0
    assert loss_at(9.95, baseline) == 5.0
    assert loss_at(9.8, baseline) is None
    assert loss_at(1011, baseline) is None
    # A larger model that is worse than a smaller one does not raise the loss that is to be beaten.
    assert loss_at(1000, [Point(10, 5.0), Point(100, 4.5), Point(1000, 4.8)]) == 4.5


def test_the_trend_of_a_lead_over_sizes_by_hand():
    """Leads 0.1, 0.2, 0.4 at sizes 1, 2, 8: a line through (0, 0.1), (1, 0.2), (3, 0.4) rises by 0.1 a doubling."""
    losses = {1: 5.0, 2: 4.5, 8: 4.0}
    leads = {0: {1: 0.1, 2: 0.2, 8: 0.4}, 1: {1: 0.3, 2: 0.3, 8: 0.3}}
    runs = {f"plain-{size}": {s: record(size, loss) for s in leads} for size, loss in losses.items()}
    runs |= {f"ours-{n}": {s: record(n, losses[n] - leads[s][n]) for s in leads} for n in losses}
    runs["ours-beyond"] = {s: record(99, 1.0) for s in leads}  # no model of the baseline is as large
    families = {"plain": ("plain-1", "plain-2", "plain-8"), "ours": ("ours-1", "ours-2", "ours-8", "ours-beyond")}
    models = compared(curves(families, runs, "parameters"), "ours", "plain")
    assert [model.size for model in models] == [1, 2, 8, 99]
    assert models[1].differences == [pytest.approx(-0.2), pytest.approx(-0.3)]
    assert models[3].differences == [None, None]
    found = trend(models)
    assert found.mean == pytest.approx((-0.1 + 0) / 2)
    assert found.count == 2
    assert trend(models[2:]) is None


SIZED = {
    "plain-8": {"projector": "none", "d_model": 8, "layers": 1},
    "plain-16": {"projector": "none", "d_model": 16, "layers": 1},
    "ours": {"d_model": 6, "layers": 1},
}


def plan_of(world, tmp_path, **changes):
    families = {"plain": ["plain-8", "plain-16"], "ours": ["ours"]}
    changes = {"variants": SIZED, "pairs": [], "search": None, "families": families} | changes
    return write_plan(world, tmp_path, **changes)


def test_a_report_compares_families(world, tmp_path, capsys, request):
    path = plan_of(world, tmp_path, budgets={"ours": {"parameters": 5000}})
    assert indra("ablate", path, *folders(tmp_path)) == 0
    (picture,) = tmp_path.rglob("report_front.png")
    assert picture.stat().st_size > 5000
    request.getfixturevalue("no_pictures")
    assert indra("ablate", path, *folders(tmp_path)) == 0  # all runs are done, and they are the plan's
    (report,) = tmp_path.rglob("report.md")
    text = report.read_text()
    records = {v: json.loads((report.parent / f"{v}-seed{load_plan(path).seeds[0]}.json").read_text()) for v in SIZED}
    assert records["plain-8"]["parameters"] < records["plain-16"]["parameters"]
    assert f"| ours | parameters | {records['ours']['parameters']:,} |" in text
    assert "| ours | FLOPs a token |" in text
    assert "minus plain" in text
    bands = records["ours"]["bands"]
    assert sum(band["tokens"] for band in bands.values()) == records["ours"]["sources"]["all"]["tokens"]
    titles = [f"{name} ({band['tokens']:,})" for name, band in bands.items()]
    assert f"| variant | {' | '.join(titles)} |" in text


def test_runs_of_another_plan_are_refused_before_a_variant_runs_beside_them(world, tmp_path, capsys, no_pictures):
    """Those that differ in what the data decide too: the width of a budget, the stages, the steps of a trial."""
    stage = "stages: [{name: a, fraction: 1.0, warmup_fraction: %s}]"
    given = {
        "variants": {"ours": {"d_model": 6, "strategy": "own.yaml"}, "plain-8": SIZED["plain-8"]},
        "families": {}, "seeds": [3], "base": BASE | {"max_steps": 2}, "budgets": {"ours": {"parameters": 5000}},
        "search": {"variants": {"ours": [{"weight_decay": 0.1}]}, "fraction": 0.5},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(stage % 0.1)
    assert indra("ablate", plan_of(world, tmp_path, **given), *folders(tmp_path), "--only", "ours") == 0
    search, must = given["search"], r"\.json; must belong to a run with"
    for warmup, changes, said in (
        (0.1, {"budgets": {"ours": {"parameters": 6000}}}, rf"ours-seed3{must} mlp_width \d+, as planned, not \d+"),
        (0.2, {}, rf"ours-seed3{must} stages .*'warmup_fraction': 0\.2.*, as planned, not .*0\.1"),
        (0.1, {"search": search | {"fraction": 1.0}}, rf"ours-try0{must} max_steps 2, as planned, not 1"),
    ):
        (tmp_path / "own.yaml").write_text(stage % warmup)
        path = plan_of(world, tmp_path, **given | changes)
        assert indra("ablate", path, *folders(tmp_path), "--only", "plain-8") == 2
        assert re.search(said, capsys.readouterr().err)
    (tmp_path / "own.yaml").write_text(stage % 0.1)
    path = plan_of(world, tmp_path, **given | {"seeds": [3, 5]})
    first = json.loads((tmp_path / "results" / "ours-seed3.json").read_text())
    for name, value in (("mlp_width", 9), ("stages", {})):  # without the data, runs are compared with each other
        other = first | {"settings": first["settings"] | {"seed": 5, name: value}}
        (tmp_path / "results" / "ours-seed5.json").write_text(json.dumps(other))
        assert indra("ablate", path, "--output", tmp_path / "results", "--report-only") == 2
        said = rf"ours-seed5{must} {name} of ours .*, as the others, not {re.escape(str(value))}; remove it"
        assert re.search(said, capsys.readouterr().err)


def test_a_budget_chooses_the_width(world, tmp_path, capsys):
    budgets = {"plain-8": {"parameters": 7000}, "ours": {"mflop_per_token": 0.05}}
    plan = load_plan(plan_of(world, tmp_path, budgets=budgets))
    bench = Bench(plan, AblateSettings(), tmp_path / "results", tmp_path / "work", "")
    plain, ours = (bench.run(variant, plan.seeds[0], {}).settings for variant in budgets)
    counted = sum(p.numel() for p in trial_run(plain).model.parameters())
    assert abs(counted - 7000) <= 3 * 8 / 2  # a unit of width has three weights for each of 8 inputs
    assert abs(sizes_of(ours, bench.dataset).flops_per_token - 50_000) <= 6 * 3 * 12 / 2
    assert sizes_of(ours.model_copy(update={"mlp_width": ours.mlp_width + 1}), bench.dataset).flops_per_token > 50_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": {"ours": {}}}, "must have either parameters or mflop_per_token"),
        ({"budgets": {"ours": {"parameters": 1, "mflop_per_token": 1}}}, "must have either parameters or"),
        ({"budgets": {"nobody": {"parameters": 9}}}, "must be one of the variants plain-8, plain-16, ours"),
        ({"budgets": {"ours": {"parameters": 100}}}, "variants.ours: budget: got 100 parameters; must be at least "),
        ({"families": {"plain": ["nobody"]}}, "families: got nobody; must be one of the variants"),
        ({"families": {"plain": []}}, "at least 1"),
        ({"equal_work": [["plain-8", "plain-16"]]}, "equal_work: got plain-8 plain-16; must agree within 1 %"),
        (
            {"variants": {"ours": {"mlp_width": 9}}, "families": {}, "budgets": {"ours": {"parameters": 9}}},
            "variants.ours.mlp_width: got 9; must be left out, because the budget of ours chooses it",
        ),
        (
            {"budgets": {"ours": {"parameters": 9}}, "search": {"grid": [{"mlp_width": 9}, {"mlp_width": 8}]}},
            "search.grid.mlp_width: got 9; must be left out, because the budget of ours chooses it",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(world, tmp_path, capsys, changes, said):
    assert indra("ablate", plan_of(world, tmp_path, **changes), *folders(tmp_path), "--dry-run") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("count", [3, 12])
def test_many_variants_are_named_once_below_the_curves(monkeypatch, tmp_path, count):
    monkeypatch.setattr(plots, "_saved", lambda figure, folder, name: figure)
    runs = {f"v{i}": {s: {"calibration": {"x": [0, 1], "y": [0, i]}} for s in (0, 1)} for i in range(count)}
    figure = plots.save_picture(tmp_path, "calibration", runs)
    beside, below = [axes.get_legend() for axes in figure.axes], figure.legends
    assert (beside == [None], len(below)) == ((True, 1) if count == 12 else (False, 0))
    legend = below[0] if below else beside[0]
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[1:]}
    assert len(styles) == count
