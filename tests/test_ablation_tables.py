"""The tables of an ablation's report: whole rows by hand, from made-up records."""

from __future__ import annotations

from types import SimpleNamespace

from indraquantum.ablation.report import (
    _about_front,
    alignment_table,
    bands_table,
    front_tables,
    search_table,
    sizes_table,
)

FAMILIES = SimpleNamespace(families={"plain": ("s", "l"), "ours": ("o",)})


def sized(size: int, *losses: float) -> dict[int, dict]:
    """The runs of a variant, one with each seed from 0 on."""
    return {
        seed: {"parameters": size, "flops_per_token": 2 * size, "sources": {"all": {"cross_entropy": loss}}}
        for seed, loss in enumerate(losses)
    }


def test_families_by_hand():
    """The worst loss is 5. Plain leads it by 1 nat on ln 2 of the ln 200 from size 10 to 2000.

    Ours leads by 0.75 and 1.1 on ln 20, so it is 0.2932 and 0.4911 ahead. Half the interval is
    12.7062 * 0.0989 = 1.2572. A plain model of its size has 4.5, so it is 0.25 and 0.6 better; half the interval is
    12.7062 * 0.175. No plain model reaches its loss with seed 1. One size has no trend.
    """
    runs = {"s": sized(10, 5.0, 5.0), "l": sized(1000, 4.0, 4.0), "o": sized(100, 4.25, 3.9)}
    heights, equals = front_tables(FAMILIES, runs)
    assert heights.rows == [
        ["plain", "parameters", "s, l", "0.1308 ± 0.0000", "", ""],
        ["ours", "parameters", "o", "0.5230 ± 1.2572", "+0.3922 ± 1.2572", ""],
        ["plain", "FLOPs a token", "s, l", "0.1308 ± 0.0000", "", ""],
        ["ours", "FLOPs a token", "o", "0.5230 ± 1.2572", "+0.3922 ± 1.2572", ""],
    ]
    assert equals.rows == [
        ["ours", "parameters", "100", "2", "-0.4250 ± 2.2236", "not measured"],
        ["ours", "FLOPs a token", "200", "2", "-0.4250 ± 2.2236", "not measured"],
    ]


def test_families_are_compared_over_the_seeds_that_all_share():
    """Seed 0 alone: plain leads by 0.5 nats on ln 2 of ln 200, ours by 0.4. Over all seeds, ours would be ahead."""
    runs = {"s": sized(10, 5.0, 5.0), "l": sized(1000, 4.5, 4.9), "o": sized(1000, 4.6)}
    heights, equals = front_tables(FAMILIES, runs)
    assert heights.rows[:2] == [
        ["plain", "parameters", "s, l", "0.0654", "", ""],
        ["ours", "parameters", "none", "0.0523", "-0.0131", ""],
    ]
    # 0.4 / 0.5 of the way from 10 to 1000 on a logarithmic scale: 10 * 100 ** 0.8 = 398
    assert equals.rows[0] == ["ours", "parameters", "1,000", "1", "+0.1000", "0.398"]


def test_the_trend_of_a_lead_by_hand():
    """The lead is 0.1 at size 10 and 0.3 at 40, two doublings later."""
    runs = {"s": sized(10, 5.0), "l": sized(40, 4.0), "o": sized(10, 4.9), "p": sized(40, 3.7)}
    heights, beside = front_tables(SimpleNamespace(families={"plain": ("s", "l"), "ours": ("o", "p")}), runs)
    assert [row[-1] for row in heights.rows] == ["", "-0.1000", "", "-0.1000"]
    assert [row[4:] for row in beside.rows[:2]] == [["-0.1000", "1.149"], ["-0.3000", "not measured"]]


def test_a_variant_without_a_run_is_left_out_and_named():
    plan = SimpleNamespace(families={"plain": ("s", "l"), "ours": ("o", "p"), "third": ("q",)})
    runs = {"s": sized(10, 5.0, 5.0), "l": sized(1000, 4.0, 4.0), "o": sized(100, 4.25, 3.9), "q": {}}
    assert [table.rows for table in front_tables(plan, runs)] == [table.rows for table in front_tables(FAMILIES, runs)]
    assert _about_front(plan, runs).startswith("Without a finished run, and left out: p, q. All figures ")
    heights, beside = front_tables(plan, {"o": runs["o"]})
    assert heights.rows[0][:3] == ["ours", "parameters", "o"]
    assert beside.rows == []


def test_variants_of_equal_size_stay_apart_over_the_seeds():
    """Variant a has 3.0 and 3.2, b 3.1 and 3.1, and a plain model of their size 3.5."""
    runs = {"s": sized(10, 3.5, 3.5), "a": sized(10, 3.0, 3.2), "b": sized(10, 3.1, 3.1)}
    _, beside = front_tables(SimpleNamespace(families={"plain": ("s",), "ours": ("a", "b")}), runs)
    assert [row[4] for row in beside.rows[:2]] == ["-0.4000 ± 1.2706", "-0.4000 ± 0.0000"]


def test_a_family_without_a_common_seed_gives_no_rows():
    runs = {"s": sized(10, 5.0), "l": sized(1000, 4.5), "o": {7: sized(1000, 4.6)[0]}}
    assert [table.rows for table in front_tables(FAMILIES, runs)] == [[], []]
    assert _about_front(FAMILIES, runs).startswith("The finished variants share no seed yet, so the tables are empty. ")


def test_bands_by_hand():
    """The half-width of two values 0.2 apart is 12.7062 * 0.1. A run may lack a band, and older runs lack all."""
    first = {"rare": {"cross_entropy": 7.25, "tokens": 1200}, "frequent": {"cross_entropy": 2.0, "tokens": 34}}
    second = {"frequent": {"cross_entropy": 2.2, "tokens": 35}}
    found = bands_table({"old": {0: {}}, "new": {0: {"bands": first}, 1: {"bands": second}}})
    assert found.header == ["variant", "rare (1,200)", "frequent (34)"]
    assert found.rows == [["old", "none", "none"], ["new", "7.2500", "2.1000 ± 1.2706"]]


def test_sizes_by_hand():
    def record(tokens_per_second: float, peak: int | None) -> dict:
        return {
            "parameters": 3697, "table_parameters": 2560, "flops_per_token": 1_234_567.0, "steps": 1500,
            "tokens": 72_000, "timing": {"tokens_per_second": tokens_per_second, "peak_memory_bytes": peak},
        }  # fmt: skip

    found = sizes_table({"both": {0: record(1000, 2**21), 1: record(1200, 2**22)}, "one": {5: record(900, None)}})
    assert found.header == [
        "variant", "parameters", "in the table", "MFLOP/token", "steps", "tokens", "tokens/s", "peak MiB",
    ]  # fmt: skip
    same = ["3,697", "69.2%", "1.235", "1,500", "72,000"]
    assert found.rows == [["both", *same, "1,100 ± 1,271", "3 ± 13"], ["one", *same, "900", "none"]]


def test_correlations_by_hand():
    names = ("magnitude_confidence", "softmax_confidence", "phase_entropy", "softmax_entropy")
    known = dict(zip(names, (0.5, 0.25, None, -0.125), strict=True))
    runs = {"taught": {0: {"alignment": known}, 1: {"alignment": {}}}, "plain": {0: {"alignment": None}}}
    found = alignment_table(runs)
    assert found.header == [
        "variant", "magnitude, confidence", "control: max p, confidence", "phase, entropy",
        "control: own entropy, entropy",
    ]  # fmt: skip
    assert found.rows == [["taught", "0.500", "0.250", "none", "-0.125"], ["plain", *["none"] * 4]]


def test_the_chosen_setting_of_a_search_is_that_of_the_runs():
    """A setting that was added when the runs were done is better, and none of them has it."""
    rates = [{"learning_rate": rate} for rate in (1.0, 2.0, 3.0)]
    losses = [{"status": "finished", "sources": {"all": {"cross_entropy": loss}}} for loss in (5.0, 4.5, 4.25)]
    plan = SimpleNamespace(grid_of=lambda variant: rates)

    def marked(trials: list, runs: dict) -> list[str]:
        return [row[-1] for row in search_table(plan, {"x": trials}, {"x": runs}).rows]

    assert marked(losses, {0: {"chosen": rates[1]}}) == ["", "chosen", ""]
    assert marked(losses, {}) == ["", "", "chosen"]
    assert marked([losses[0], {"status": "failed"}, None], {}) == ["chosen", "", ""]
    assert marked([None, None, None], {}) == ["", "", ""]
