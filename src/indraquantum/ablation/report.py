"""The report of an ablation, report.md and report.html, made from the runs' JSON files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from indraquantum.ablation.blocks import Block, Code, Heading, Paragraph, Picture, Table, html_page, markdown
from indraquantum.ablation.final import read_final
from indraquantum.ablation.front import (
    SIZES,
    Compared,
    at_equal_seeds,
    compared,
    curves,
    hypervolumes,
    lead,
    mean_point,
    on_front,
    trend,
)
from indraquantum.ablation.intervals import Interval, interval, paired
from indraquantum.ablation.plan import Plan
from indraquantum.ablation.plots import PICTURES, Runs, draw_front, save_front, save_picture
from indraquantum.ablation.results import Result, read_results
from indraquantum.ablation.sizes import FLOPS_FORMULA
from indraquantum.errors import UserError
from indraquantum.files import write_text
from indraquantum.inference.samples import PROMPTS

FIGURES = {  # of a source: title, digits
    "cross_entropy": ("nats/token", 4),
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits/byte", 4),
    "calibration_error": ("ECE", 4),
    "accuracy": ("accuracy", 4),
}
Trials = dict[str, list[Result | None]]  # by variant, in the order of its grid; None if not done yet
EQUAL = 0.001  # relative difference in tokens that counts as equal: rows are padded a little differently
SAMPLES = {
    "words": ("words", 1),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
    "repetition_4": ("repeated 4-grams", 3),
}
ALIGNMENT = {
    "magnitude_confidence": "magnitude, confidence",
    "softmax_confidence": "control: max p, confidence",
    "phase_entropy": "phase, entropy",
    "softmax_entropy": "control: own entropy, entropy",
}


def write_report(plan: Plan, folder: Path) -> Path:
    """Write report.md and report.html from the JSON files in `folder`; return the path of the latter.

    Raises:
        UserError: no run is finished, or one does not belong to this plan.
    """
    records, trials = read_results(plan, folder)
    finished = {v: {s: r for s, r in by_seed.items() if r["status"] == "finished"} for v, by_seed in records.items()}
    runs = {variant: by_seed for variant, by_seed in finished.items() if by_seed}
    if not runs:
        raise UserError("results", folder, "holds no finished run of this plan")
    blocks = report_blocks(plan, folder, records, runs, trials)
    for name, text in (("report.md", markdown(blocks)), ("report.html", html_page(blocks))):
        write_text(folder / name, text)
    return folder / "report.html"


def report_blocks(plan: Plan, folder: Path, records: Runs, runs: Runs, trials: Trials) -> list[Block]:
    """Return the whole report."""
    blocks: list[Block] = [
        Heading(f"Ablation {plan.name}", 1),
        Paragraph(plan.about or "Variants compared at equal training tokens."),
    ]
    blocks += [Heading("Held-out figures"), Paragraph(_about_figures(runs)), figures_table(runs)]
    if plan.pairs:
        said = (
            "First minus second at equal seeds, in nats per token. Below 0 the first is better. A * "
            "marks an interval without 0."
        )
        blocks += [Heading("Pairs"), Paragraph(said), pairs_table(plan, runs)]
    if any(record.get("bands") for record in _all(runs)):
        said = (
            "Cross-entropy on the table half by how often the predicted token occurs in the training text, in nats per "
            "token. The number in brackets says how many predicted tokens are in the column."
        )
        blocks += [Heading("Rare and frequent tokens"), Paragraph(said), bands_table(runs)]
    if (final := read_final(folder)) is not None:
        blocks += [Heading("Final figures"), Paragraph(_about_final(final, runs)), *final_tables(plan, final)]
    stages = stages_table(runs)
    if stages.rows:
        said = (
            "Cross-entropy of all held-out documents at the end of each stage, in nats per token. A rise "
            "means forgetting."
        )
        blocks += [Heading("After each stage"), Paragraph(said), stages]
    blocks += [Heading("Size and speed"), Paragraph(_about_sizes(plan, runs)), sizes_table(runs)]
    if any(variant in runs for variant in _of_families(plan)):
        blocks += [Heading("Front"), Paragraph(_about_front(plan, runs)), *front_tables(plan, runs)]
        blocks.append(Picture(save_front(folder, runs, plan.families), draw_front.__doc__.split("\n")[0]))
    if any(record["alignment"] for record in _all(runs)):
        said = "Pearson correlation on the table half. The controls are read from the student's own softmax."
        blocks += [Heading("What the state knows of the teacher"), Paragraph(said), alignment_table(runs)]
    blocks += [Heading("Pictures")]
    for name, draw in PICTURES.items():
        if name != "readouts" or any(record["readouts"] for record in _all(runs)):
            blocks.append(Picture(save_picture(folder, name, runs), draw.__doc__.split("\n")[0]))
    said = "Written at fixed prompts with a fixed seed. Below the table is the text of each variant's first seed."
    blocks += [Heading("Samples"), Paragraph(said), samples_table(runs), *sample_texts(runs)]
    if plan.search is not None:
        said = (
            "Cross-entropy of each setting on the choice half, in nats per token. The variant was trained with the "
            "chosen one, the best when its runs began."
        )
        blocks += [Heading("Search"), Paragraph(said), search_table(plan, trials, records)]
    blocks += [Heading("Runs"), Paragraph(_about_runs(plan, records)), runs_table(records)]
    return [*blocks, Heading("Provenance"), Code(_origin(records))]


def figures_table(runs: Runs) -> Table:
    """Mean and 95 % interval over seeds, for each variant and source."""
    rows = []
    for source in _first(runs)["sources"]:
        for variant, by_seed in runs.items():
            cells = [
                _mean((record["sources"][source][name] for record in by_seed.values()), digits)
                for name, (_, digits) in FIGURES.items()
            ]
            rows.append([variant, source, str(len(by_seed)), *cells])
    return Table(["variant", "source", "seeds", *(title for title, _ in FIGURES.values())], rows)


def pairs_table(plan: Plan, runs: Runs) -> Table:
    """Paired differences of cross-entropy, and of the calibration error over all sources."""
    rows = []
    for first, second in plan.pairs:
        for title, get in _differences(runs):
            sides = ({seed: get(record) for seed, record in runs.get(name, {}).items()} for name in (first, second))
            differences = paired(*sides)
            if not differences:
                rows.append([f"{first} - {second}", title, "0", "not run", ""])
                continue
            found = interval(list(differences.values()))
            each = ", ".join(f"{seed}: {value:+.4f}" for seed, value in differences.items())
            star = " *" if found.clear_of_zero() else ""
            rows.append([f"{first} - {second}", title, str(found.count), _shown(found, 4, "+") + star, each])
    return Table(["pair", "figure", "seeds", "difference", "each seed"], rows)


def bands_table(runs: Runs) -> Table:
    """Loss by how often the predicted token occurs in the training text. Older runs lack this figure."""
    known = {v: [r["bands"] for r in by_seed.values() if r.get("bands")] for v, by_seed in runs.items()}
    first = next(bands for every in known.values() for bands in every)
    rows = [
        [variant, *(_mean((bands[name]["cross_entropy"] for bands in every if name in bands), 4) for name in first)]
        for variant, every in known.items()
    ]
    return Table(["variant", *(f"{name} ({band['tokens']:,})" for name, band in first.items())], rows)


def _differences(runs: Runs) -> Iterable[tuple[str, Callable[[Result], float]]]:
    for source in _first(runs)["sources"]:
        yield source, lambda record, source=source: record["sources"][source]["cross_entropy"]
    yield "ECE, all", lambda record: record["sources"]["all"]["calibration_error"]


def stages_table(runs: Runs) -> Table:
    """Cross-entropy of each source at the end of each stage, and its change, for variants with several stages."""
    rows = []
    for variant, by_seed in runs.items():
        ends = [_stage_ends(record) for record in by_seed.values()]
        if len(ends[0]) < 2:
            continue
        for before, stage in pairwise([None, *ends[0]]):
            for source in ends[0][stage]:
                changes = [end[stage][source] - end[before][source] for end in ends] if before else []
                change = _shown(interval(changes), 4, "+") if changes else ""
                rows.append([variant, stage, source, _mean([end[stage][source] for end in ends], 4), change])
    return Table(["variant", "stage", "source", "nats/token", "since the stage before"], rows)


def _stage_ends(record: Result) -> dict[str, dict[str, float]]:
    """Return the last held-out figures of each stage, in order; older runs do not name their stages."""
    return {line["stage"]: line["held_out"] for line in record["curve"] if line.get("stage") and line["held_out"]}


def sizes_table(runs: Runs) -> Table:
    """Parameters, work and speed of each variant."""
    rows = []
    for variant, by_seed in runs.items():
        record = next(iter(by_seed.values()))
        timings = [record["timing"] for record in by_seed.values()]
        peaks = [timing["peak_memory_bytes"] for timing in timings]
        rows.append([
            variant, f"{record['parameters']:,}", f"{record['table_parameters'] / record['parameters']:.1%}",
            f"{record['flops_per_token'] / 1e6:.3f}", f"{record['steps']:,}", f"{record['tokens']:,}",
            _mean((timing["tokens_per_second"] for timing in timings), 0),
            _mean((peak and peak / 2**20 for peak in peaks), 0),
        ])  # fmt: skip
    header = ["variant", "parameters", "in the table", "MFLOP/token", "steps", "tokens", "tokens/s", "peak MiB"]
    return Table(header, rows)


def front_tables(plan: Plan, runs: Runs) -> list[Table]:
    """For parameters and for work: how low each family reaches, and each of its models beside the baseline."""
    baseline, *_ = plan.families
    heights, models = [], []
    shared = at_equal_seeds(_of_families(plan), runs)
    there = {family: tuple(v for v in variants if v in shared) for family, variants in plan.families.items()}
    families = {family: variants for family, variants in there.items() if variants}
    for size, title in SIZES.items() if families else ():
        found = curves(families, shared, size)
        means = {variant: mean_point(by_seed, size) for variant, by_seed in shared.items()}
        best, volumes = on_front(means), hypervolumes(found)
        for family, variants in families.items():
            own = [] if family == baseline or baseline not in families else compared(found, family, baseline)
            against = (lead(volumes, family, baseline), trend(own)) if own else (None, None)
            on = ", ".join(v for v in variants if v in best) or "none"
            height = _mean(volumes.get(family, {}).values(), 4)
            shown = ["" if figure is None else _shown(figure, 4, "+") for figure in against]
            heights.append([family, title, on, height, *shown])
            models += [_beside_baseline(family, title, model) for model in own]
    return [
        Table(
            ["family", "size", "on the front", "mean lead, nats", f"minus {baseline}", "each doubling of the size"],
            heights,
        ),
        Table(
            [
                "family", "size", "size of the model", "seeds", f"minus {baseline} of this size, nats",
                f"size of an equally good {baseline}, as a multiple",
            ],
            models,
        ),
    ]  # fmt: skip


def _of_families(plan: Plan) -> list[str]:
    return [variant for variants in plan.families.values() for variant in variants]


def _beside_baseline(family: str, title: str, model: Compared) -> list[str]:
    figures = []
    for values, places, sign in ((model.differences, 4, "+"), (model.ratios, 3, "")):
        known = [value for value in values if value is not None]
        figures.append(_shown(interval(known), places, sign) if len(known) == len(values) else "not measured")
    return [family, title, f"{model.size:,.0f}", str(len(model.ratios)), *figures]


def _about_front(plan: Plan, runs: Runs) -> str:
    baseline, *_ = plan.families
    every, shared = _of_families(plan), at_equal_seeds(_of_families(plan), runs)
    missing = ", ".join(variant for variant in every if not runs.get(variant))
    return (
        (f"Without a finished run, and left out: {missing}. " if missing else "")
        + ("" if shared else "The finished variants share no seed yet, so the tables are empty. ")
        + "All figures are over the seeds that all these variants share. A variant is on the front if no other variant "
        "of at most its size has a lower mean loss. The mean lead is the "
        "hypervolume: for each size, take the lowest loss of the family's models up to that size. The figure says how "
        "far it is below the worst loss of these runs, averaged over the logarithm of the size, up to twice the "
        f"largest model. The second table compares each model with {baseline}: with a model of the same size, and with "
        "one of the same loss. Between two measured sizes, the loss counts as linear in the logarithm of the size. The "
        "last column of the first table says by how much the difference at equal size changes when the size doubles "
        "(a least-squares line for each seed); below 0, the lead grows with the size."
    )


def alignment_table(runs: Runs) -> Table:
    """Correlations of readouts and controls with the teacher."""
    rows = []
    for variant, by_seed in runs.items():
        known = [record["alignment"] for record in by_seed.values() if record["alignment"]]
        rows.append([variant, *(_mean((alignment[name] for alignment in known), 3) for name in ALIGNMENT)])
    return Table(["variant", *ALIGNMENT.values()], rows)


def samples_table(runs: Runs) -> Table:
    """How varied the samples are."""
    rows = []
    for variant, by_seed in runs.items():
        samples = [record["samples"] for record in by_seed.values()]
        rows.append([variant, *(_mean((s[name] for s in samples), digits) for name, (_, digits) in SAMPLES.items())])
    return Table(["variant", *(title for title, _ in SAMPLES.values())], rows)


def sample_texts(runs: Runs) -> Iterable[Block]:
    """Each prompt with the text of each variant."""
    for number, prompt in enumerate(PROMPTS):
        texts = [f"[{v}] {next(iter(by_seed.values()))['samples']['texts'][number]}" for v, by_seed in runs.items()]
        yield Code("\n\n".join([prompt, *texts]))


def search_table(plan: Plan, trials: Trials, records: Runs) -> Table:
    """The settings that were tried for each variant, and the one that its runs have, or will have."""
    rows = []
    for variant, tried in trials.items():
        losses = [r["sources"]["all"]["cross_entropy"] if r and r["status"] == "finished" else None for r in tried]
        grid = plan.grid_of(variant)
        trained = next(iter(records.get(variant, {}).values()), None)  # all seeds have the same setting
        found = [(loss, place) for place, loss in enumerate(losses) if loss is not None]
        best = grid[min(found)[1]] if found else None
        chosen = best if trained is None else trained["chosen"]
        for setting, record, loss in zip(grid, tried, losses, strict=True):
            told = "not done" if record is None else f"failed: {record.get('line')}" if loss is None else f"{loss:.4f}"
            rows.append([variant, _setting(setting), told, "chosen" if setting == chosen else ""])
    return Table(["variant", "setting", "nats/token, choice half", ""], rows)


def runs_table(records: Runs) -> Table:
    """How each run ended, its chosen setting, and whether a collapse was suspected."""
    rows = []
    for variant, by_seed in records.items():
        for seed, record in by_seed.items():
            seen = sorted({kind for line in record["curve"] for kind in line["collapse"] or ()})
            told = record["status"] if record["status"] == "finished" else f"failed: {record['line']}"
            rows.append([variant, str(seed), told, _setting(record["chosen"]), ", ".join(seen)])
    return Table(["variant", "seed", "ended", "chosen setting", "collapse suspected"], rows)


def _about_figures(runs: Runs) -> str:
    record = _first(runs)
    tokens = ", ".join(f"{name} {figures['tokens']:,}" for name, figures in record["sources"].items())
    return (
        f"On the table half of the held-out documents ({record['documents']} documents; predicted tokens: {tokens}), "
        "which the plan's search has not looked at. Other plans on the same data are measured on the same half. "
        "The figures are the mean ± half of the 95 % t-interval over seeds."
    )


def final_tables(plan: Plan, final: Result) -> list[Block]:
    """The figures on the test split, and the plan's pairs there."""
    runs: Runs = {}
    for run in final["runs"].values():
        runs.setdefault(run["variant"], {})[run["seed"]] = run
    return [figures_table(runs), *([pairs_table(plan, runs)] if plan.pairs else [])]


def _about_final(final: Result, runs: Runs) -> str:
    earlier = final["earlier_readings"]
    said = "for the first time" if not earlier else f"after {len(earlier)} earlier readings, by {'; '.join(earlier)}"
    told = f"On the test split ({final['documents']} documents), read for this on {final['date']}, {said}."
    finished = {f"{variant}-seed{seed}" for variant, by_seed in runs.items() for seed in by_seed}
    others = sorted(final["runs"].keys() ^ finished)
    apart = f" They do not cover the same runs as this report: only one of them has {', '.join(others)}."
    return told + apart if others else told


def _about_sizes(plan: Plan, runs: Runs) -> str:
    said = f"FLOPs per token = {FLOPS_FORMULA}."
    if not plan.equal_rows:
        return f"{said} The variants train on different numbers of rows, as the plan says."
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    seen = {seed: {by_seed[seed]["tokens"] for by_seed in runs.values() if seed in by_seed} for seed in seeds}
    apart = {seed: max(tokens) / min(tokens) - 1 for seed, tokens in seen.items() if len(tokens) > 1}
    if not apart:
        return said
    unequal = ", ".join(str(seed) for seed, part in apart.items() if part > EQUAL)
    told = f"NOT AT EQUAL TOKENS: seeds {unequal}" if unequal else "The rows are equally many, but not equally full"
    return f"{said} {told}: tokens differ by up to {max(apart.values()):.3%}."


def _about_runs(plan: Plan, records: Runs) -> str:
    done, planned = sum(map(len, records.values())), len(plan.variants) * len(plan.seeds)
    said = (
        f"{done} of {planned} runs are done. A kind of collapse is listed if it was suspected at any "
        "evaluation, confirmed or not."
    )
    apart = "; ".join(_computed_apart(records))
    return f"{said} The runs were not all computed alike: {apart}." if apart else said


def _computed_apart(records: Runs) -> Iterable[str]:
    """Say in what the runs were computed differently, such as their number format. Older runs do not tell."""
    names: dict[str, dict[str, list[str]]] = {}  # of the runs, by what may differ and its value
    for variant, by_seed in records.items():
        for seed, record in by_seed.items():
            for what, value in record.get("computed_by", {}).items():
                names.setdefault(what, {}).setdefault(str(value), []).append(f"{variant}-seed{seed}")
    for what, by_value in names.items():
        if len(by_value) > 1:
            yield f"{what} " + " and ".join(f"{value} in {', '.join(runs)}" for value, runs in by_value.items())


def _origin(records: Runs) -> str:
    """Return commits, commands, versions and hashes, each once."""
    every = list(_all(records))
    facts = {
        "commit": [record["commit"] for record in every],
        "command": [record["command"] for record in every],
        "versions": [_listed(record["versions"]) for record in every],
        "computed by": [_listed(record["computed_by"]) for record in every if "computed_by" in record],
        "data sha256": [record["settings"]["data"] for record in every],
        "signals sha256": [record["settings"]["signals"] for record in every],
    }
    return "\n".join(f"{name}: {value}" for name, values in facts.items() for value in dict.fromkeys(values))


def _mean(values: Iterable[float | None], digits: int) -> str:
    """Return the mean and interval of the values that exist; a diverged run lacks some."""
    known = [value for value in values if value is not None]
    return _shown(interval(known), digits) if known else "none"


def _shown(found: Interval, digits: int, sign: str = "") -> str:
    mean = f"{found.mean:{sign},.{digits}f}"
    return mean if found.half_width is None else f"{mean} ± {found.half_width:,.{digits}f}"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _setting(overrides: dict[str, Any]) -> str:
    return _listed(overrides) or "as planned"


def _all(runs: Runs) -> Iterable[Result]:
    return (record for by_seed in runs.values() for record in by_seed.values())


def _first(runs: Runs) -> Result:
    return next(iter(_all(runs)))
