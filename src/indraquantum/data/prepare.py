"""`indra prepare`: turns sources into documents, tokens and rows, and writes both layouts.

Run it: `python scripts/prepare_mixed_data.py`.

Everything is checked before anything is written, and the output appears as a whole. Sources are read twice, once to
choose documents and once to encode them, so that memory holds a few numbers for each document and not its text. (A
.json file is parsed as a whole, and finding near duplicates needs all text.) Equal settings and inputs give equal
bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from indraquantum.config import PrepareSettings
from indraquantum.data.dataset import write_dataset
from indraquantum.data.dataset_manifest import is_dataset
from indraquantum.data.held_out import SPLITS, TEST, VALIDATION
from indraquantum.data.large_arrays import Spool, chunks, release
from indraquantum.data.mixture import (
    DrawnSource,
    Mixture,
    draw_sources,
    find_sources,
    random_order,
    source_options,
)
from indraquantum.data.packing import pack
from indraquantum.data.padded import checksum_path, write_checksum, write_padded
from indraquantum.data.records import readable
from indraquantum.data.split import Split
from indraquantum.data.temporary import temporary_folder
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer, text_chunks
from indraquantum.errors import Unreachable, UserError, all_or_missing
from indraquantum.files import atomic_file, make_folder, sha256_of
from indraquantum.progress import Progress, warn

MOST_UNKNOWN = 0.001  # share of the tokens that may stand for text without a token, before a warning
WINDOW_DOCUMENTS = 1 << 17  # packed together
CHUNK_ROWS = (
    1 << 10
)  # moved at once; each row may read 64 kB of a mapped file, which stay in memory until they are released
# Numbers of the independent random streams that a seed gives.
ROW_ORDER, PICKLE_ORDER = 1, 2  # stream 0 draws the samples


@dataclass(frozen=True)
class SourceReport:
    """What became of one source."""

    name: str
    available: int  # samples in the source
    duplicates: int  # of these, exact copies of earlier samples of any source
    near_duplicates: int | None  # near copies, the exact ones among them; None where they were not counted
    documents: int  # samples drawn, including the held-out ones
    validation_documents: int  # of these, held out for validation
    test_documents: int  # and held out for the test
    tokens: int  # of all documents, including control tokens
    padding_share: float  # padded layout: positions that are padding, over this source's documents
    cut_share: float  # padded layout: tokens that are cut off
    unused_fields: dict[str, int]  # records with a value in a field that is not used
    left_out: dict[str, int]  # parts of the source that are not documents, by kind
    notes: tuple[str, ...]  # sentences on how it was read


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` wrote."""

    pickle: Path
    folder: Path
    row_length: int
    rows: int  # packed training rows
    validation_rows: int
    test_rows: int  # 0 if the sources are too small for a test split
    tokens: int  # of the training rows
    validation_tokens: int
    test_tokens: int
    fill: float  # packed training layout: positions that hold a token
    padded_rows: int  # rows of the pickle
    padding_share: float  # padded layout: positions that are padding
    cut_share: float  # padded layout: tokens that are cut off
    sources: tuple[SourceReport, ...]
    notes: tuple[str, ...]  # a sentence for each source with fewer samples than asked for
    skipped: int  # wrong records that were skipped, listed in skipped.jsonl


def prepare(settings: PrepareSettings) -> PrepareReport:
    """Read, draw, encode and write both layouts.

    Args:
        settings: What to read, how much of it, and where to write.

    Returns:
        What was written where, and the figures to print.

    Raises:
        UserError: an input is wrong; nothing was written then.
    """
    folder = _check_output(settings.output)
    source_options(settings)
    tokenizer = _tokenizer(settings)
    if lost := tokenizer.what_it_loses():
        said = "; instructions and code lose their lines" if "line breaks" in lost else ""
        warn(f"warning: --tokenizer {settings.tokenizer} does not keep {', '.join(lost)} of a text{said}")
    mixture = draw_sources(settings)
    options = settings.model_dump(mode="json", exclude={"output"})
    make_folder("--output", settings.output.parent)
    try:
        outputs = [settings.output, folder, checksum_path(settings.output)]
        with temporary_folder(settings.output.parent, outputs) as spool:
            used = [part for part in range(len(SPLITS)) if any((s.parts == part).any() for s in mixture.sources)]
            sides = {SPLITS[part]: _Side(spool, part, tokenizer.dtype) for part in used}
            reports = tuple(
                _encode(source, number, sides, tokenizer, settings.max_length)
                for number, source in enumerate(mixture.sources)
            )
            splits = {name: side.pack(settings, tokenizer.eos_id) for name, side in sides.items()}
            facts = [{key: value for key, value in asdict(report).items() if "share" not in key} for report in reports]
            with atomic_file(settings.output) as temporary:
                rows = _in_pickle_order(splits["train"], settings.seed)
                write_padded(temporary, rows, settings.max_length, tokenizer.eos_id)
                write_dataset(folder, splits, facts, tokenizer, options, mixture.skipped)
                digest = sha256_of(temporary)
                # If the process is killed from here on, the pickle has no checksum, but never a wrong one.
                checksum_path(settings.output).unlink(missing_ok=True)
            write_checksum(settings.output, digest)
            return _report(settings, folder, splits, reports, mixture)
    except OSError as error:
        raise UserError("--output", settings.output, f"could not be written ({error.strerror})") from None


def _tokenizer(settings: PrepareSettings) -> TextTokenizer:
    """Return the tokenizer. If it can't be downloaded, the error also names the sources that can't be."""
    load = partial(load_tokenizer, "--tokenizer", settings.tokenizer, settings.document_start)
    try:
        return load()
    except Unreachable:
        return all_or_missing([load, *find_sources(settings, [])])[0]


def _report(
    settings: PrepareSettings,
    folder: Path,
    splits: dict[str, Split],
    reports: tuple[SourceReport, ...],
    mixture: Mixture,
) -> PrepareReport:
    train, validation, test = (splits.get(name) for name in SPLITS)
    lengths = np.diff(train.document_offsets)
    kept = int(np.minimum(lengths, settings.max_length, out=lengths).sum())
    shares = _padded_shares(train.num_documents * settings.max_length, train.num_tokens, kept)
    return PrepareReport(
        pickle=settings.output,
        folder=folder,
        row_length=settings.max_length,
        rows=train.num_rows,
        validation_rows=validation.num_rows,
        test_rows=test.num_rows if test else 0,
        tokens=train.num_tokens,
        validation_tokens=validation.num_tokens,
        test_tokens=test.num_tokens if test else 0,
        fill=train.num_tokens / (train.num_rows * settings.max_length),
        padded_rows=train.num_documents,
        padding_share=shares.padding,
        cut_share=shares.cut,
        sources=reports,
        notes=tuple(drawn.shortfall for drawn in mixture.sources if drawn.shortfall),
        skipped=len(mixture.skipped),
    )


def _check_output(output: Path) -> Path:
    """Check, without writing anything, that the pickle and the folder beside it can be made; return the folder."""
    if output.suffix != ".pkl":
        raise UserError(
            "--output", output, "must end in .pkl; the packed dataset is written beside it, without that ending"
        )
    folder = output.with_suffix("")
    if output.is_dir():
        raise UserError("--output", output, "must be a file, not a folder")
    if folder.exists() and not is_dataset(folder) and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            "--output", output, f"would overwrite {folder}, which is not a prepared dataset; give another path"
        )
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError("--output", output, f"must be in a folder that can be written ({there} is not)")
    return folder


class _Side:
    """One part of the dataset while it is written. Everything that grows with the text is in files."""

    def __init__(self, folder: Path, part: int, dtype: np.dtype) -> None:
        self.folder, self.part = folder / SPLITS[part], part
        self.folder.mkdir()
        self.tokens = Spool(self.folder / "tokens", dtype)
        columns = {"lengths": np.int64, "sources": np.uint8, "numbers": np.int64}
        self.lengths, self.sources, self.numbers = (Spool(self.folder / n, kind) for n, kind in columns.items())

    def add(self, documents: list[np.ndarray], source: int, numbers: np.ndarray) -> None:
        """Append encoded documents of one source, with their places in it."""
        self.tokens.add(np.concatenate(documents))
        self.lengths.add(np.array([len(document) for document in documents]))
        self.sources.add(np.full(len(documents), source))
        self.numbers.add(numbers)

    def pack(self, settings: PrepareSettings, padding_id: int) -> Split:
        """Pack the documents, and put the rows in random order, so that sources are mixed everywhere."""
        lengths = self.lengths.array()
        offsets = _offsets(lengths)
        packed, sizes = Spool(self.folder / "packed", np.int64, 2), []
        # In windows, because packing keeps Python objects for every piece.
        for start in range(0, len(lengths), WINDOW_DOCUMENTS):
            packing = pack(lengths[start : start + WINDOW_DOCUMENTS], settings.max_length)
            places = offsets[start + packing.documents] + packing.pieces[:, 0]
            packed.add(np.stack([places, packing.pieces[:, 1]], axis=1))
            sizes.append(np.diff(packing.row_pieces).astype(np.int32))
            release(lengths)
        pieces, sizes = packed.array(), np.concatenate(sizes)
        order = random_order(len(sizes), settings.seed, ROW_ORDER, self.part)
        firsts = _offsets(sizes)[:-1]
        shuffled = Spool(self.folder / "pieces", np.int64, 2)
        for start in range(0, len(order), CHUNK_ROWS):
            rows = order[start : start + CHUNK_ROWS]
            ends = np.cumsum(sizes[rows])
            moved = np.arange(ends[-1]) + np.repeat(firsts[rows] - (ends - sizes[rows]), sizes[rows])
            shuffled.add(pieces[moved])
            release(pieces)
        return Split(
            tokens=self.tokens.array(),
            document_offsets=offsets,
            document_sources=self.sources.array(),
            pieces=shuffled.array(),
            row_pieces=_offsets(sizes[order]),
            row_length=settings.max_length,
            padding_id=padding_id,
            document_numbers=self.numbers.array(),
        )


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """Where each part begins and the last one ends, (parts + 1,) int64."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _encode(
    drawn: DrawnSource, number: int, sides: dict[str, _Side], tokenizer: TextTokenizer, row_length: int
) -> SourceReport:
    """Encode a source's documents in chunks."""
    done, tokens, kept, unknown = 0, 0, 0, 0
    unknown_id = tokenizer.unknown_id
    spelled = "" if unknown_id is None else str(tokenizer.backend.id_to_token(unknown_id))
    with Progress(f"tokenize {drawn.name}", len(drawn.numbers), "documents") as progress:
        for chunk in text_chunks(drawn.read_texts()):
            documents = tokenizer.encode_documents(chunk)
            parts, numbers = (values[done : done + len(chunk)] for values in (drawn.parts, drawn.numbers))
            for side in sides.values():
                places = np.flatnonzero(parts == side.part)
                if len(places):
                    side.add([documents[place] for place in places], number, numbers[places])
            tokens += sum(map(len, documents))
            if unknown_id is not None:
                unknown += sum(int(np.count_nonzero(document == unknown_id)) for document in documents)
            kept += sum(min(len(document), row_length) for document in documents)
            done += len(chunk)
            progress.update(len(chunk))
    if unknown_id is not None and unknown > MOST_UNKNOWN * tokens:
        warn(
            f"warning: {drawn.name}: {unknown / tokens:.1%} of the tokens are {spelled}, which stands for text that "
            "the tokenizer has no token for; this text is lost"
        )
    shares = _padded_shares(done * row_length, tokens, kept)
    return SourceReport(
        name=drawn.name,
        available=drawn.available,
        duplicates=drawn.duplicates,
        near_duplicates=drawn.near_duplicates,
        documents=done,
        validation_documents=int((drawn.parts == VALIDATION).sum()),
        test_documents=int((drawn.parts == TEST).sum()),
        tokens=tokens,
        padding_share=shares.padding,
        cut_share=shares.cut,
        unused_fields={readable(name): count for name, count in drawn.reading.unused_fields.items()},
        left_out=dict(drawn.reading.left_out),
        notes=tuple(drawn.reading.notes),
    )


def _in_pickle_order(split: Split, seed: int) -> Iterator[np.ndarray]:
    """The documents of a split in the order of the pickle's rows."""
    tokens = np.asarray(split.tokens)  # slices of a mapped array are slow, those of a plain view are not
    for part in chunks(random_order(split.num_documents, seed, PICKLE_ORDER)):
        for done, document in enumerate(part.tolist()):
            if done % CHUNK_ROWS == 0:
                release(split.tokens)
            yield tokens[split.document_offsets[document] : split.document_offsets[document + 1]]


class _PaddedShares(NamedTuple):
    """Shares of the padded layout, from 0 to 1."""

    padding: float  # positions that are padding
    cut: float  # tokens that are cut off


def _padded_shares(positions: int, tokens: int, kept: int) -> _PaddedShares:
    """Return what the padded layout wastes if it keeps `kept` of these tokens."""
    return _PaddedShares(1 - kept / positions, 1 - kept / tokens) if kept else _PaddedShares(0.0, 0.0)
