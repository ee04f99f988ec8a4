"""Families of models beside each other at several sizes: which one reaches the lowest loss with no more parameters?

A plan names its families, such as signed and plain, with the variants of each. The same questions are asked of the
work: which family reaches the lowest loss with no more FLOPs a token? A variant is on the front if no other variant of
at most its size has a lower mean loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from indraquantum.ablation.intervals import Interval, interval, paired
from indraquantum.ablation.results import Result

SIZES = {"parameters": "parameters", "flops_per_token": "FLOPs a token"}  # of a record: what the report calls it


class Point(NamedTuple):
    """A run as the front sees it."""

    size: float  # parameters, or FLOPs a token
    loss: float  # on the table half, nats per token


def table_loss(by_seed: dict[int, Result]) -> Interval:
    """Return the mean loss of a variant's runs on the table half, nats per token, with its interval."""
    return interval([record["sources"]["all"]["cross_entropy"] for record in by_seed.values()])


def mean_point(by_seed: dict[int, Result], size: str) -> Point:
    """Return the point of a variant: its size, and the mean loss of its runs."""
    return Point(next(iter(by_seed.values()))[size], table_loss(by_seed).mean)


def at_equal_seeds(variants: Iterable[str], runs: dict[str, dict[int, Result]]) -> dict[str, dict[int, Result]]:
    """Return the runs of those of `variants` that have any, with the seeds that all of these share."""
    there = {variant: runs[variant] for variant in variants if runs.get(variant)}
    seeds = set.intersection(*map(set, there.values())) if there else set()
    return {variant: {seed: by_seed[seed] for seed in sorted(seeds)} for variant, by_seed in there.items() if seeds}


Curves = dict[str, dict[int, list[Point]]]  # by family and seed, by rising size


def curves(families: dict[str, tuple[str, ...]], runs: dict[str, dict[int, Result]], size: str) -> Curves:
    """Return the finished runs of each family. Seeds that lack a variant of the family are left out.

    Variants of equal size have the same order with every seed.

    Args:
        families: the variants of each family.
        runs: finished runs by variant and seed.
        size: one of SIZES.
    """
    found: Curves = {}
    for family, variants in families.items():
        there = [runs.get(variant, {}) for variant in variants]
        seeds = set.intersection(*(set(by_seed) for by_seed in there))
        found[family] = {
            seed: sorted((_point(by_seed[seed], size) for by_seed in there), key=lambda point: point.size)
            for seed in sorted(seeds)
        }
    return found


def _point(record: Result, size: str) -> Point:
    return Point(record[size], record["sources"]["all"]["cross_entropy"])


def on_front(points: dict[str, Point]) -> list[str]:
    """Return the names of the points that no other dominates: none is as small and better, or smaller and as good."""

    def dominated(name: str) -> bool:
        own = points[name]
        return any(p.size <= own.size and p.loss <= own.loss and p != own for p in points.values())

    return [name for name in points if not dominated(name)]


def hypervolume(points: Sequence[Point], smallest: float, largest: float, worst: float) -> float:
    """Return how far below `worst` the best loss within a size is, on average over the logarithm of the size.

    Args:
        points: the runs of a family.
        smallest: the smallest size of any family.
        largest: the size up to which the best loss counts, above `smallest`.
        worst: a loss, in nats, that no run exceeds.
    """
    steps = sorted(point for point in points if point.loss <= worst)
    area, best = 0.0, worst
    for point, after in zip(steps, [*(p.size for p in steps[1:]), largest], strict=True):
        best = min(best, point.loss)
        area += (worst - best) * math.log(after / point.size)
    return area / math.log(largest / smallest)


def effective_size(point: Point, baseline: Sequence[Point]) -> float | None:
    """Return how large a model of the baseline is that has the loss of `point`; None beyond its measured sizes.

    Between two measured sizes, the loss counts as linear in the logarithm of the size.
    """
    useful: list[Point] = []  # a model that is no better than a smaller one is not needed for any loss
    for model in baseline:
        if not useful or model.loss < useful[-1].loss:
            useful.append(model)
    for smaller, larger in itertools.pairwise(useful):
        if larger.loss <= point.loss <= smaller.loss:
            share = (smaller.loss - point.loss) / (smaller.loss - larger.loss)
            return smaller.size * (larger.size / smaller.size) ** share
    return None


def loss_at(size: float, baseline: Sequence[Point]) -> float | None:
    """Return the lowest loss of a baseline model of at most `size`, in nats per token.

    Between two measured sizes, the loss counts as linear in the logarithm of the size. None more than 1 % beyond the
    measured sizes.
    """
    at_size = {point.size: point.loss for point in sorted(baseline, reverse=True)}  # the lowest loss of each size
    sizes = sorted(at_size)
    losses = list(itertools.accumulate((at_size[s] for s in sizes), min))
    if not 0.99 * sizes[0] <= size <= 1.01 * sizes[-1]:
        return None
    return float(np.interp(math.log(size), [math.log(s) for s in sizes], losses))


class Compared(NamedTuple):
    """A model of a family beside the baseline, by seed. None where the baseline was not measured."""

    size: float  # parameters, or FLOPs a token
    differences: list[float | None]  # its loss minus that of a baseline model of its size, in nats per token
    ratios: list[float | None]  # the size of an equally good baseline model, as a multiple of its own


def compared(found: Curves, family: str, baseline: str) -> list[Compared]:
    """Return each model of `family`, by rising size, beside the baseline at the seeds that both have."""
    seeds = sorted(found[family].keys() & found[baseline].keys())
    models = []
    for own in zip(*(found[family][seed] for seed in seeds), strict=True):  # a model with each seed
        losses = [loss_at(point.size, found[baseline][seed]) for seed, point in zip(seeds, own, strict=True)]
        equals = [effective_size(point, found[baseline][seed]) for seed, point in zip(seeds, own, strict=True)]
        models.append(
            Compared(
                own[0].size,
                [None if loss is None else point.loss - loss for point, loss in zip(own, losses, strict=True)],
                [equal and equal / own[0].size for equal in equals],
            )
        )
    return models


def trend(models: Sequence[Compared]) -> Interval | None:
    """Return by how much the difference from the baseline changes when the size doubles, in nats per token.

    It is the slope of a least-squares line for each seed. None if fewer than two sizes can be compared.
    """
    known = [model for model in models if None not in model.differences]
    if len({model.size for model in known}) < 2:
        return None
    doublings = [math.log2(model.size) for model in known]
    by_seed = zip(*(model.differences for model in known), strict=True)
    return interval([statistics.linear_regression(doublings, differences).slope for differences in by_seed])


def hypervolumes(found: Curves) -> dict[str, dict[int, float]]:
    """Return the hypervolume of each family and seed, up to twice the largest size, so that this model counts."""
    points = [point for by_seed in found.values() for curve in by_seed.values() for point in curve]
    smallest, largest = min(p.size for p in points), 2 * max(p.size for p in points)
    worst = max(p.loss for p in points)
    return {
        family: {seed: hypervolume(curve, smallest, largest, worst) for seed, curve in by_seed.items()}
        for family, by_seed in found.items()
    }


def lead(volumes: dict[str, dict[int, float]], family: str, baseline: str) -> Interval | None:
    """Return the difference of two families' hypervolumes at equal seeds, in nats; None if they share no seed."""
    differences = paired(volumes.get(family, {}), volumes.get(baseline, {}))
    return interval(list(differences.values())) if differences else None
