"""The summaries that `indra prepare` and `indra capture` print: a few plain lines from their reports."""

from __future__ import annotations

from indraquantum.data.instructions import ABOUT
from indraquantum.data.prepare import PrepareReport, SourceReport
from indraquantum.data.records import counted, listed, samples_have
from indraquantum.teacher.capture import CaptureReport

FIELDS_TOLD = 10  # unused fields that are named for each source


def prepare_summary(report: PrepareReport) -> str:
    """Return the samples, tokens, rows and padding of a preparation, one line each."""
    lines = [f"note: {note}" for note in report.notes]
    for source in report.sources:
        lines += [f"note: {source.name}: {note}" for note in source.notes]
        unused = [(name, count) for name, count in source.unused_fields.items() if name not in ABOUT]
        lines += [
            f"note: {source.name}: {samples_have(count)} a field '{name}', which is not used"
            for name, count in unused[:FIELDS_TOLD]
        ]
        if len(unused) > FIELDS_TOLD:
            more = counted(len(unused) - FIELDS_TOLD, "more field")
            lines.append(f"note: {source.name}: {more} are not used; manifest.json lists them")
        if about := [name for name in source.unused_fields if name in ABOUT]:
            lines.append(f"note: {source.name}: these fields are not used: {', '.join(about)}")
        if source.left_out:
            lines.append(f"note: {source.name}: left out {listed(source.left_out)}")
        lines.append(
            f"{source.name}: {_drawn(source)}, {source.tokens:,} tokens; "
            f"{_copies(source)}; "
            f"held out: {source.validation_documents:,} for validation, {source.test_documents:,} for the test; "
            f"in the pickle, padded to {report.row_length}, {source.padding_share:.0%} of the positions are padding "
            f"and {source.cut_share:.0%} of the tokens are cut off"
        )
    if report.skipped:
        skipped = counted(report.skipped, "wrong record")
        lines.append(f"skipped: {skipped}, listed in {report.folder / 'skipped.jsonl'}")
    lines += [
        f"packed: {report.rows:,} rows of {report.row_length}, {report.tokens:,} tokens, {report.fill:.1%} filled; "
        f"validation {report.validation_rows} rows, {report.validation_tokens:,} tokens; "
        f"test {report.test_rows} rows, {report.test_tokens:,} tokens; in {report.folder}",
        f"padded: {report.padded_rows:,} rows, {report.padding_share:.0%} padding; in {report.pickle}",
    ]
    return "\n".join(lines)


def _drawn(source: SourceReport) -> str:
    if source.documents > source.available:  # a weight above 1
        return f"{source.documents:,} samples drawn from {source.available:,}"
    return f"{source.documents:,} of {source.available:,} samples"


def _copies(source: SourceReport) -> str:
    near = "" if source.near_duplicates is None else f" and {source.near_duplicates - source.duplicates:,} near"
    return counted(source.duplicates, f"exact{near} duplicate")


def capture_summary(report: CaptureReport) -> str:
    """Return statistics of the signals, their size and the speed of the capture, in three lines."""
    figures = report.statistics
    bounds = figures.mean_entropy_bounds_nats
    entropy = f"between {bounds[0]:.3f} and {bounds[1]:.3f}" if bounds else f"{figures.mean_entropy_nats:.3f}"
    cross_entropy = ", ".join(f"{split} {value:.3f}" for split, value in figures.teacher_cross_entropy.items())
    return "\n".join(
        [
            f"signals: {figures.positions:,} positions ({report.positions_kept:,} captured before), "
            f"{report.bytes:,} bytes, {figures.bytes_per_token:.1f} a token; {report.tokens_per_second:,.0f} tokens/s",
            f"teacher: mean entropy {entropy} nats, mean confidence "
            f"{figures.mean_confidence:.3f}, {figures.mean_ids:.1f} distinct ids a position; "
            f"cross-entropy (nats/token) {cross_entropy}",
            f"coverage: {report.coverage['train']:.1%} of the training rows; the signals are in {report.output}",
        ]
    )
