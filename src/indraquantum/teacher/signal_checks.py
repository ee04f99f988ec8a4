"""Checks that stored signals are possible. A checksum shows only that bytes are unchanged, not that they make sense.

Legend: N positions of a shard, C of them at a time, M entries (distinct pairs of position and id).
"""

from __future__ import annotations

import numpy as np

from indraquantum.teacher.manifest import Identity, Manifest, ShardEntry
from indraquantum.teacher.ranges import LOGPROB, PROBABILITY, SLACK, TINY, Range
from indraquantum.teacher.shard import Shard

_ENTRIES_AT_ONCE = 1 << 15  # these stay in the cache, which is twice as fast as a million at once


def check_values(shard: Shard, entry: ShardEntry, manifest: Manifest) -> None:
    """Check every figure and every entry of a shard: its range, and that it agrees with the others at its position.

    The counts and sums in the manifest must agree with them, too.

    Raises:
        UserError: a value is impossible; the message names the file, the tensor, the value and what is allowed.
    """
    for name in sorted(shard.figures.keys() - {"next_logprob"}):
        shard.figure(name, slice(None))
    logprob_N = shard.figures["next_logprob"]
    logprob_N = logprob_N[~np.isnan(logprob_N)]
    shard.check("next_logprob", logprob_N, LOGPROB)
    if len(logprob_N) != entry.sums.labels:
        shard.refuse(f"next_logprob holds {len(logprob_N)} numbers that are not nan, but must hold {entry.sums.labels}")
    if manifest.served:
        low_N, high_N = shard.figures["entropy_low"], shard.figures["entropy_high"]
        if (low_N > high_N).any():
            place = int((low_N > high_N).argmax())
            shard.refuse(f"entropy_low is {low_N[place]:.6g}, but must be at most entropy_high {high_N[place]:.6g}")
    shard.check("ids_per_position", shard.ids_per_position, _ids_range(manifest))
    ends_N = np.cumsum(shard.ids_per_position, dtype=np.int64)
    begin = first = 0
    while begin < len(ends_N):
        end = max(begin + 1, int(np.searchsorted(ends_N, first + _ENTRIES_AT_ONCE, "right")))
        _check_entries(shard, manifest, first, shard.ids_per_position[begin:end].astype(np.int64))
        begin, first = end, int(ends_N[end - 1])
    if not manifest.served:  # a server's confidence is over its own vocabulary
        _check_together(shard, manifest)
    _check_sums(shard, entry)


def _check_together(shard: Shard, identity: Identity) -> None:
    """Check entropy and the label's log-probability against the confidence c, which bounds both.

    No token is likelier than c, so the entropy is at least -log c. It is largest where all other tokens share the rest
    equally.
    """
    names = ("confidence", "entropy", "next_logprob")
    confidence_N, entropy_N, logprob_N = (shard.figures[name].astype(np.float64) for name in names)
    high_N = np.minimum(confidence_N * (1 + SLACK) + TINY, 1)
    rest_N = 1 - np.maximum(confidence_N * (1 - SLACK) - TINY, 1 / identity.vocabulary_size)
    least_N = -np.log(high_N) * (1 - SLACK) - SLACK
    most_N = -rest_N * np.log(rest_N / (identity.vocabulary_size - 1)) - (1 - rest_N) * np.log1p(-rest_N)
    most_N = most_N * (1 + SLACK) + SLACK
    logprob_most_N = np.log(high_N) * (1 - SLACK) + SLACK
    for name, wrong_N, values_N, bound, bounds_N in (
        ("entropy", entropy_N < least_N, entropy_N, "at least", least_N),
        ("entropy", entropy_N > most_N, entropy_N, "at most", most_N),
        ("next_logprob", logprob_N > logprob_most_N, logprob_N, "at most", logprob_most_N),
    ):
        if wrong_N.any():
            place = int(wrong_N.argmax())
            beside = f"at confidence {confidence_N[place]:.6g}"
            shard.refuse(f"{name} is {values_N[place]:.6g}, but must be {bound} {bounds_N[place]:.6g} {beside}")


def _check_sums(shard: Shard, entry: ShardEntry) -> None:
    """Check the manifest's totals; those of figures were taken before float16 rounded them."""
    sums = entry.sums
    if (ids := int(shard.ids_per_position.sum(dtype=np.int64))) != sums.ids:
        shard.refuse(f"ids_per_position sums to {ids}, but must be {sums.ids} as in the manifest")
    low, high = sums.entropy_bounds_nats or (None, None)
    stated = {
        "entropy": sums.entropy_nats,
        "entropy_low": low,
        "entropy_high": high,
        "confidence": sums.confidence,
        "next_logprob": sums.label_logprob_nats,
    }
    for name in sorted(stated.keys() & shard.figures.keys()):
        total = float(np.nansum(shard.figures[name], dtype=np.float64))
        allowed = abs(total) * SLACK + TINY * entry.positions
        if stated[name] is None or abs(total - stated[name]) > allowed:
            shard.refuse(f"{name} sums to {total:.6g}, but must be {stated[name]} as in the manifest")


def _check_entries(shard: Shard, manifest: Manifest, first: int, counts_C: np.ndarray) -> None:
    """Check the entries of neighbouring positions, of which the first is the shard's entry `first`."""
    ids_M, amounts_M = shard.entries(first, int(counts_C.sum()))
    begins_C = np.cumsum(counts_C) - counts_C
    if manifest.kind != "full":
        shard.check("packed: a token's id", ids_M, Range(0, manifest.vocabulary_size - 1))
        ascends_M = np.diff(ids_M, prepend=-1) > 0
        ascends_M[begins_C] = True
        if not ascends_M.all():
            place = int((~ascends_M).argmax())
            shard.refuse(
                f"packed: a token's id is {ids_M[place]}, but must be above the one before, {ids_M[place - 1]}"
            )
    sums_C = np.add.reduceat(amounts_M, begins_C)
    if manifest.kind == "sampled":
        shard.check("packed: a token's count", amounts_M, Range(1, manifest.draws))
        shard.check("packed: the sum of a position's counts", sums_C, Range(manifest.draws, manifest.draws))
    else:
        shard.check("packed: a token's probability", amounts_M, PROBABILITY)
        least = 1 - SLACK if manifest.kind == "full" else 0
        shard.check("packed: the sum of a position's probabilities", sums_C, Range(least, 1 + SLACK))


def _ids_range(identity: Identity) -> Range:
    """How many distinct tokens a position may have."""
    if identity.kind == "sampled":
        return Range(1, min(identity.draws, identity.vocabulary_size))
    kept = identity.top_k or identity.vocabulary_size
    return Range(kept, kept)
