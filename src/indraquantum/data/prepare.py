"""`indra prepare`: sources to documents to tokens to rows, in both layouts.

Run it: `python scripts/prepare_mixed_data.py`.

Everything is checked before anything is written, and what is written appears as a whole. The same settings and the
same inputs give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from indraquantum.config import PrepareSettings
from indraquantum.data.dataset import Split, is_dataset, write_dataset
from indraquantum.data.mixture import DrawnSource, draw_sources, random_order, source_options
from indraquantum.data.packing import pack
from indraquantum.data.padded import write_padded
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import atomic_file, make_folder

CHUNK_DOCUMENTS = 1024  # texts handed to the tokenizer at once: enough for all cores, little memory
# Numbers of the independent random streams that a seed gives.
ROW_ORDER, PICKLE_ORDER = 1, 2  # stream 0 draws the samples


@dataclass(frozen=True)
class SourceReport:
    """What became of one source."""

    name: str
    available: int  # samples that the source holds
    duplicates: int  # of these, exact copies of earlier samples of any source
    near_duplicates: int | None  # near copies, the exact ones among them; None where they were not counted
    documents: int  # samples drawn, the held-out ones among them
    validation_documents: int  # of these, held out
    tokens: int  # of all documents, BOS and EOS among them
    padding_share: float  # padded layout: positions that are padding, over this source's documents
    cut_share: float  # padded layout: tokens that are cut off


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` wrote."""

    pickle: Path
    folder: Path
    row_length: int
    rows: int  # packed training rows
    validation_rows: int
    tokens: int  # of the training rows
    validation_tokens: int
    fill: float  # packed training layout: positions that hold a token
    padded_rows: int  # rows of the pickle
    padding_share: float  # padded layout: positions that are padding
    cut_share: float  # padded layout: tokens that are cut off
    sources: tuple[SourceReport, ...]
    notes: tuple[str, ...]  # a sentence for each source that held fewer samples than asked for
    skipped: int  # records left out as wrong, listed in the folder's skipped.jsonl


class _Source(NamedTuple):
    """One source, encoded."""

    drawn: DrawnSource
    documents: list[np.ndarray]

    def kept(self, held_out: bool) -> list[np.ndarray]:
        """The documents that are, or are not, held out."""
        held = self.drawn.held_out
        return [document for document, is_held in zip(self.documents, held, strict=True) if is_held == held_out]


def prepare(settings: PrepareSettings) -> PrepareReport:
    """Read, draw, encode and write both layouts.

    Args:
        settings: What to read, how much of it, and where to write.

    Returns:
        Where everything is, and the figures to print.

    Raises:
        UserError: any input that is wrong; then nothing was written.
    """
    folder = _check_output(settings.output)
    source_options(settings)
    tokenizer = load_tokenizer("--tokenizer", settings.tokenizer)
    mixture = draw_sources(settings)
    sources = [_Source(drawn, encode_all(tokenizer, drawn.texts, drawn.name)) for drawn in mixture.sources]
    splits = {
        name: _build_split(sources, held_out, settings, tokenizer)
        for name, held_out in (("train", False), ("validation", True))
    }
    training = [document for source in sources for document in source.kept(False)]
    order = random_order(len(training), settings.seed, PICKLE_ORDER)
    reports = tuple(_report_source(source, settings.max_length) for source in sources)
    facts = [{key: value for key, value in asdict(report).items() if "share" not in key} for report in reports]
    options = settings.model_dump(mode="json", exclude={"output"})
    make_folder("--output", settings.output.parent)
    try:
        with atomic_file(settings.output) as temporary:
            write_padded(temporary, [training[i] for i in order], settings.max_length, tokenizer.eos_id)
            write_dataset(folder, splits, facts, tokenizer, options, mixture.skipped)
    except OSError as error:
        raise UserError("--output", settings.output, f"could not be written ({error.strerror})") from None

    shares = _padded_shares(training, settings.max_length)
    train, validation = splits["train"], splits["validation"]
    return PrepareReport(
        pickle=settings.output,
        folder=folder,
        row_length=settings.max_length,
        rows=train.num_rows,
        validation_rows=validation.num_rows,
        tokens=train.num_tokens,
        validation_tokens=validation.num_tokens,
        fill=train.num_tokens / (train.num_rows * settings.max_length),
        padded_rows=len(training),
        padding_share=shares.padding,
        cut_share=shares.cut,
        sources=reports,
        notes=tuple(drawn.shortfall for drawn in mixture.sources if drawn.shortfall),
        skipped=len(mixture.skipped),
    )


def _check_output(output: Path) -> Path:
    """Check, without writing anything, that the pickle and the folder beside it can be made; return the folder."""
    if output.suffix != ".pkl":
        raise UserError("--output", output, "must end in .pkl; the packed dataset stands beside it without that ending")
    folder = output.with_suffix("")
    if output.is_dir():
        raise UserError("--output", output, "must be a file; it is a folder")
    if folder.exists() and not is_dataset(folder) and (folder.is_file() or any(folder.iterdir())):
        raise UserError("--output", output, f"would replace {folder}, which is no prepared dataset")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError("--output", output, f"must be in a folder that can be written ({there} is not)")
    return folder


def encode_all(tokenizer: TextTokenizer, texts: Sequence[str], name: str) -> list[np.ndarray]:
    """Encode documents in chunks, with a progress bar that is silent where there is no terminal."""
    documents: list[np.ndarray] = []
    with tqdm(total=len(texts), desc=f"tokenize {name}", unit=" documents", disable=None) as bar:
        for start in range(0, len(texts), CHUNK_DOCUMENTS):
            documents += tokenizer.encode_documents(texts[start : start + CHUNK_DOCUMENTS])
            bar.update(len(documents) - bar.n)
    return documents


def _build_split(
    sources: Sequence[_Source], held_out: bool, settings: PrepareSettings, tokenizer: TextTokenizer
) -> Split:
    """Pack one side of the documents; rows come in random order, so that no part of them is of one kind."""
    kept = [source.kept(held_out) for source in sources]
    documents = [document for of_source in kept for document in of_source]
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    packing = pack(lengths, settings.max_length)
    pieces = packing.pieces + np.stack([offsets[packing.documents], np.zeros_like(packing.documents)], axis=1)

    order = random_order(len(packing.row_pieces) - 1, settings.seed, ROW_ORDER, int(held_out))
    sizes = np.diff(packing.row_pieces)[order]
    row_pieces = np.concatenate([[0], np.cumsum(sizes)])
    moved = np.arange(len(pieces)) + np.repeat(packing.row_pieces[:-1][order] - row_pieces[:-1], sizes)
    return Split(
        tokens=np.concatenate(documents),
        document_offsets=offsets,
        document_sources=np.repeat(np.arange(len(kept), dtype=np.uint8), [len(of_source) for of_source in kept]),
        pieces=pieces[moved],
        row_pieces=row_pieces,
        row_length=settings.max_length,
        padding_id=tokenizer.eos_id,
        document_numbers=np.concatenate(
            [source.drawn.numbers[source.drawn.held_out == held_out] for source in sources]
        ),
    )


class _PaddedShares(NamedTuple):
    """Shares of the padded layout, from 0 to 1."""

    padding: float  # positions that are padding
    cut: float  # tokens that are cut off


def _padded_shares(documents: Sequence[np.ndarray], row_length: int) -> _PaddedShares:
    """What the padded layout wastes on these documents."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    kept = np.minimum(lengths, row_length).sum()
    return _PaddedShares(float(1 - kept / (len(lengths) * row_length)), float(1 - kept / lengths.sum()))


def _report_source(source: _Source, row_length: int) -> SourceReport:
    shares = _padded_shares(source.documents, row_length)
    return SourceReport(
        name=source.drawn.name,
        available=source.drawn.available,
        duplicates=source.drawn.duplicates,
        near_duplicates=source.drawn.near_duplicates,
        documents=len(source.documents),
        validation_documents=int(source.drawn.held_out.sum()),
        tokens=sum(map(len, source.documents)),
        padding_share=shares.padding,
        cut_share=shares.cut,
    )
