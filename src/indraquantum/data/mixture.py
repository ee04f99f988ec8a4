"""Decides which documents are used: reads the sources, finds copies, draws samples, and holds some of them out."""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from indraquantum.config import PrepareSettings
from indraquantum.data.detokenize import detokenize
from indraquantum.data.duplicates import exact_duplicates, near_duplicates
from indraquantum.data.held_out import (
    TRAIN,
    VALIDATION,
    Keys,
    different_documents,
    hold_out,
    text_key,
    without_common,
)
from indraquantum.data.instructions import AlpacaSample, alpaca_samples, local_instructions
from indraquantum.data.large_arrays import chunks
from indraquantum.data.prompt import format_alpaca
from indraquantum.data.records import Reading, counted, is_text
from indraquantum.data.sources import TextSource, is_heading, open_text, text_documents
from indraquantum.errors import UserError, all_or_missing

SAMPLING = 0  # number of the random stream that draws samples
MAX_SOURCES = 255  # a source's number is one byte
ALL = "all"  # no source's name: in figures and strategies it means all of them
# Shorter lines do not count as paragraphs: many documents share a line such as "Yes.".
PARAGRAPH_CHARACTERS = 40
AMOUNT = re.compile(r"\d{1,12}|\d+(\.\d+)?x")


@dataclass
class DrawnSource:
    """The documents of one source that are used."""

    name: str
    available: int  # samples it holds
    duplicates: int  # of these, exact copies of earlier samples of any source
    near_duplicates: int | None  # near copies, the exact ones among them; None where they were not counted
    usable: int  # samples left to draw from; a weight above 1 draws them several times
    wanted: int  # samples asked for, at most `usable` for a weight
    numbers: np.ndarray  # (documents,) int64: place of each in the source, ascending; a weight above 1 repeats them
    read: Callable[[], Iterator[_Document]]  # reads the source from its beginning
    keys: np.ndarray  # (available,) uint64: of all its documents at the first reading
    field: str  # the option that names it, for errors
    reading: Reading  # what the first reading found
    parts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))  # (documents,): as `hold_out` has

    @property
    def shortfall(self) -> str | None:
        """A sentence if the source has fewer samples than asked for, else None."""
        if self.usable >= self.wanted:
            return None
        return f"{self.name} has only {self.usable:,} of the {self.wanted:,} samples asked for; all of them are used"

    def read_texts(self) -> Iterator[str]:
        """Read the source again and yield the texts of `numbers`, so that no more than one is in memory.

        Raises:
            UserError: it is no longer what was read first.
        """
        documents = enumerate(self.read())
        place, document = -1, None
        for part in chunks(self.numbers):
            for number in part.tolist():
                while place < number:
                    place, document = next(documents, (number, None))
                    if document is None or (place == number and text_key(document.text.encode()) != self.keys[place]):
                        allowed = "changed while it was read; run `indra prepare` again"
                        raise UserError(self.field, self.name, allowed)
                yield document.text


class Mixture(NamedTuple):
    """All sources with their drawn samples, and the wrong records that were skipped."""

    sources: list[DrawnSource]
    skipped: list[dict[str, str]]  # source, file and reason of each


class SourceOption(NamedTuple):
    """A source as the options give it."""

    name: str
    field: str
    path: str
    instructions: bool  # instructions, not text
    samples: int
    weight: float | None  # if given, draw this multiple of the source's size instead of `samples`
    stream: int  # number of its random stream
    text: TextSource | None = None  # its files, once they are found


class _Document(NamedTuple):
    text: str
    paragraphs: list[str]  # what documents of different parts must not share


def random_order(count: int, seed: int, *stream: int) -> np.ndarray:
    """Return a random order of range(count), (count,) int64, that is the same in all versions of NumPy.

    NumPy promises the raw output of its bit generators for good, but not what `Generator` makes of it (NEP 19).
    """
    return np.argsort(np.random.PCG64([seed, *stream]).random_raw(count), kind="stable")


def source_options(settings: PrepareSettings) -> list[SourceOption]:
    """Return the sources: the two with options of their own, then those of --text, then those of --instructions.

    Raises:
        UserError: a weight or count can't be read, or there are too many sources.
    """
    options = [
        SourceOption("wikitext", "--wikitext", settings.wikitext, False, settings.wikitext_samples,
                     settings.wikitext_weight, 0),
        SourceOption("alpaca", "--alpaca", settings.alpaca, True, settings.alpaca_samples, settings.alpaca_weight,
                     1),
    ]  # fmt: skip
    for option in options:
        _check_name(option.field, option.path)
    for flag, given, instructions in (
        ("--text", settings.text, False), ("--instructions", settings.instructions, True)
    ):  # fmt: skip
        for value in given or ():
            path, _, amount = value.rpartition("=")
            if not path or not _is_amount(value, path, amount):
                path, amount = value, "1x"
            _check_name(flag, value)
            samples, weight = _amount(flag, value, amount)
            stem, names = _stem(path), {ALL, *(option.name for option in options)}
            name = next(n for n in (stem, *(f"{stem}-{number}" for number in range(2, 999))) if n not in names)
            options.append(SourceOption(name, flag, path, instructions, samples, weight, len(options)))
    if len(options) > MAX_SOURCES:
        raise UserError("--text", f"{len(options)} sources", f"must be at most {MAX_SOURCES}")
    used = [option for option in options if option.samples or option.weight]
    if not used:
        raise UserError(
            "--wikitext-samples", 0, "must be above 0 where --alpaca-samples is 0 and nothing else is given"
        )
    return used


def _stem(path: str) -> str:
    """Return a name for a source: its file or folder, or the part of a glob before the first wildcard."""
    names = (Path(path).stem, Path(path).absolute().parent.name)
    return next((found for name in names if (found := re.split(r"[*?\[]", name)[0].strip(".-_ "))), "text")


def _check_name(field: str, value: str) -> None:
    if not is_text(value):
        raise UserError(field, ascii(value), "must be a name in UTF-8, because the manifest holds it")


def _is_amount(value: str, path: str, amount: str) -> bool:
    """Return whether the text after the last = is meant as an amount. A path may have = too: what is there wins.

    A URL's query may have = and numbers.
    """
    if path.startswith("http"):
        _, asks, query = path.partition("?")
        return AMOUNT.fullmatch(amount) is not None and (not asks or "=" in query or amount.endswith("x"))
    is_path = set("/*?[") & set(amount) and not Path(path).exists()
    return not is_path and not Path(value).exists()


def _amount(field: str, value: str, amount: str) -> tuple[int, float | None]:
    """Read the amount behind `=`: a count, or a weight that ends in x."""
    if AMOUNT.fullmatch(amount) and 0 < float(amount.rstrip("x")) <= (1000 if amount[-1] == "x" else 10**12):
        return (0, float(amount[:-1])) if amount[-1] == "x" else (int(amount), None)
    raise UserError(
        field, value, "must be PATH, PATH=SAMPLES such as notes.txt=5000, or PATH=WEIGHTx such as notes.txt=0.5x"
    )


def find_sources(settings: PrepareSettings, readings: list[Reading]) -> Iterator[Callable[[], SourceOption]]:
    """What finds the files of each source, downloaded where they are not here; adds to `readings` how it is read."""
    for option in source_options(settings):
        readings.append(reading := Reading(option.field, settings.skip_bad))
        yield partial(_found, option, settings, reading)


def draw_sources(settings: PrepareSettings) -> Mixture:
    """Read every source, count or remove copies, draw the samples and decide which of them are held out.

    Raises:
        UserError: a source is wrong, or no source has two documents that may go to different parts.
    """
    keys, readings, skipped = [], [], []
    options = all_or_missing(find_sources(settings, readings))
    for option, reading in zip(options, readings, strict=True):
        keys.append(_keys(_documents(option, settings, reading)))
        skipped += [{"source": option.name} | entry for entry in reading.skipped]
    exact = exact_duplicates(np.concatenate([source.documents for source in keys]))
    near = None
    if settings.duplicates in ("count", "near"):  # compares all texts, which must fit into memory
        near = near_duplicates([document.text for option in options for document in _documents(option, settings)])
    removed = {"exact": exact, "near": near}.get(settings.duplicates)
    drawn, start = [], 0
    for option, source, reading in zip(options, keys, readings, strict=True):
        part = slice(start, start := start + len(source.documents))
        usable = np.arange(len(source.documents)) if removed is None else np.flatnonzero(~removed[part])
        numbers, wanted = _draw(usable, option, settings.seed)
        near_count = None if near is None else int(near[part].sum())
        drawn.append(
            DrawnSource(option.name, len(source.documents), int(exact[part].sum()), near_count, len(usable), wanted,
                        numbers, partial(_documents, option, settings), source.documents, option.field, reading)
        )  # fmt: skip
    _hold_out(options[0], drawn, keys)
    return Mixture(drawn, skipped)


def _found(option: SourceOption, settings: PrepareSettings, reading: Reading) -> SourceOption:
    """Return the source with its files. A URL is downloaded."""
    if option.instructions:
        return option._replace(path=local_instructions(option.field, option.path))
    ways = {"documents": settings.documents, "separator": settings.separator}
    return option._replace(text=open_text(option.field, option.path, reading, **ways))


def _documents(option: SourceOption, settings: PrepareSettings, reading: Reading | None = None) -> Iterator[_Document]:
    """Read a source from its beginning."""
    reading = reading or Reading(option.field, settings.skip_bad)
    if option.text is None:
        ways = {"conversations": settings.conversations, "empty_noinput": settings.empty_noinput}
        for sample in alpaca_samples(option.field, option.path, reading=reading, **ways):
            yield _Document(format_alpaca(*sample), _sample_parts(sample))
        return
    for text in text_documents(option.text, reading):
        lines = text.split("\n")
        shown = [detokenize(line) for line in lines] if settings.detokenize else lines
        # Headings are recognised before their signs are removed; afterwards they look like paragraphs.
        kept = "\n".join(new for old, new in zip(lines, shown, strict=True) if not is_heading(old.strip()))
        is_line = len(text.splitlines()) == 1  # its key is the document's own
        paragraphs = [] if is_line else [line for line in _long_lines(kept) if not is_heading(line)]
        yield _Document("\n".join(shown), paragraphs)


def _long_lines(text: str) -> list[str]:
    """Return the lines of a text that are long enough, whatever ends them: a line feed, a carriage return, U+2028."""
    lines = map(str.strip, text.splitlines())
    return [line for line in lines if len(line) >= PARAGRAPH_CHARACTERS]


def _keys(documents: Iterator[_Document]) -> Keys:
    """Return the keys of all documents and their paragraphs. The texts do not stay in memory."""
    keys, paragraphs, owners = array("Q"), array("Q"), array("q")
    for place, document in enumerate(documents):
        keys.append(text_key(document.text.encode()))
        for paragraph in document.paragraphs:
            paragraphs.append(text_key(paragraph.encode()))
            owners.append(place)
    return Keys(np.asarray(keys), np.asarray(paragraphs), np.asarray(owners))  # views: nothing is copied


def _sample_parts(sample: AlpacaSample) -> list[str]:
    """The paragraphs of an instruction: the task as a whole, and each line of input and output that is long enough.

    So is each line of an instruction of several, which brings a text of its own; one line is shared by many tasks.
    """
    instructions = [sample.instruction] if len(sample.instruction.strip().splitlines()) > 1 else []
    texts = "\n".join([sample.input, sample.output, *instructions])
    return [f"{sample.instruction}\n{sample.input}", *_long_lines(texts)]


def _draw(usable: np.ndarray, option: SourceOption, seed: int) -> tuple[np.ndarray, int]:
    """Draw from the places `usable`; return the places drawn, in order, and how many were asked for."""
    count = len(usable)
    if option.weight is None:
        wanted, copies = option.samples, 0
        rest = min(wanted, count)
    else:
        wanted = max(round(option.weight * count), 1)
        copies, rest = divmod(wanted, count) if count else (0, 0)
    times = np.full(count, copies + (rest == count), np.uint32)
    if rest < count:
        times[random_order(count, seed, SAMPLING, option.stream)[:rest]] += 1
    return np.repeat(usable, times), wanted if option.weight is None else min(wanted, count)


def _hold_out(first: SourceOption, drawn: list[DrawnSource], keys: list[Keys]) -> None:
    """Decide which part each document goes to; of a held-out document that a weight repeats, one copy is used."""
    used = [_used_keys(source, of_source) for source, of_source in zip(drawn, keys, strict=True)]
    parts = hold_out(used)
    if not any((of_source == VALIDATION).any() for of_source in parts):
        raise _nothing_held_out(first, drawn, keys, used)
    for source, once in zip(drawn, parts, strict=True):
        repeated = source.numbers[1:] == source.numbers[:-1]
        repeated = np.concatenate([[False], repeated]) if len(source.numbers) else np.zeros(0, dtype=bool)
        of_each = once[np.cumsum(~repeated) - 1]
        kept = (of_each == TRAIN) | ~repeated
        source.numbers, source.parts = source.numbers[kept], of_each[kept]


def _used_keys(source: DrawnSource, keys: Keys) -> Keys:
    """The keys of what was drawn, each document once, in new places, without the paragraphs that very many have."""
    is_used = np.zeros(len(keys.documents), dtype=bool)
    is_used[source.numbers] = True
    if not is_used.all():
        new_place = np.cumsum(is_used) - 1
        kept = is_used[keys.owners]
        keys = Keys(keys.documents[is_used], keys.paragraphs[kept], new_place[keys.owners[kept]])
    without = without_common(keys)
    if without.common:
        most = max(without.common, key=lambda common: common.documents)
        text = _paragraph(source, int(np.flatnonzero(is_used)[most.owner]), most.key)
        others = len(without.common) - 1
        more = f"; so may {counted(others, 'other text')} of many documents" if others else ""
        source.reading.note(
            f"the text {text[:60]!r} is in {most.documents:,} different documents, so it may be in several splits{more}"
        )
    return without.keys


def _paragraph(source: DrawnSource, place: int, key: int) -> str:
    """Read the source again as far as a document, and return its paragraph with this key; empty if it has changed."""
    document = next(itertools.islice(source.read(), place, None), None)
    paragraphs = document.paragraphs if document else []
    return next((paragraph for paragraph in paragraphs if text_key(paragraph.encode()) == key), "")


def _nothing_held_out(first: SourceOption, drawn: list[DrawnSource], keys: list[Keys], used: list[Keys]) -> UserError:
    """Return the error for sources of which no document can be held out; it says why."""
    found, taken = (sum(len(of_source.documents) for of_source in sources) for sources in (keys, used))
    different = [different_documents(of_source) for of_source in used]
    told = f"{'it gives' if len(drawn) == 1 else 'the sources give'} {counted(found, 'document')}"
    if taken < found:
        told += f", of which {taken:,} {'was' if taken == 1 else 'were'} drawn"
    if sum(different) < taken:
        told += f", with {counted(sum(different), 'different text')}"
    if max(different) > 1:
        told += "; those that share a paragraph stay together, and each group of them is too large to be held out"
    elif len(drawn) > 1:
        told += "; no source has 2 that differ"
    allowed = "must give at least 2 different documents that share no paragraph, because 1 is held out"
    return UserError(first.field, first.path, "; ".join([allowed, told, *drawn[0].reading.notes]))
