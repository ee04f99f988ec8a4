"""The prepared dataset: immutable token rows, memory-mapped, with everything that a training step needs to know.

Letters: S tokens of a stream, P pieces, R rows, B rows of a batch, T positions of a row.

A split is one stream of tokens, all documents back to back, and a table of pieces of that stream; a row is some pieces
side by side. A row never mixes documents: segments, positions and labels keep them apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indraquantum import __version__
from indraquantum.data.dataset_manifest import FORMAT, FORMAT_VERSION, read_dataset_manifest
from indraquantum.data.held_out import SPLITS
from indraquantum.data.large import chunks, save_npy
from indraquantum.data.same_tokenizer import require_same_tokenizer
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import atomic_folder, check_manifest_json, read_json, sha256_of, write_manifest_json

DTYPES = {
    "tokens": (np.uint16, np.uint32),
    "document_offsets": (np.int64,),
    "document_sources": (np.uint8,),
    "document_numbers": (np.int64,),
    "pieces": (np.int64,),
    "row_pieces": (np.int64,),
}
ARRAYS = tuple(DTYPES)


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """A dataset that is open for reading.

    Training, choices and captures read `train` and `validation`; `test` is for a final report alone.
    """

    train: Split
    validation: Split
    row_length: int
    source_names: tuple[str, ...]
    tokenizer: TextTokenizer
    content_sha256: str  # over all arrays and the tokenizer: signals belong to exactly one dataset
    manifest: dict[str, Any]
    test: Split | None = None  # None in datasets of version 2, in pickles, and where the sources are too small

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that are there, by name."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in named.items() if split is not None}


def content_hash(splits: dict[str, Split], source_names: Sequence[str], tokenizer: TextTokenizer) -> str:
    """Hex SHA-256 over every array, the names of the sources and the tokenizer."""
    digest = hashlib.sha256(json.dumps([tokenizer.sha256, list(source_names)]).encode())
    for name in (name for name in SPLITS if name in splits):
        split = splits[name]
        digest.update(json.dumps([name, split.row_length, split.padding_id]).encode())
        for array in ARRAYS:
            values = getattr(split, array)
            digest.update(json.dumps([array, values.dtype.str, values.shape]).encode())
            for chunk in chunks(values):
                digest.update(chunk.data)
    return digest.hexdigest()


def write_dataset(
    folder: Path,
    splits: dict[str, Split],
    sources: list[dict[str, Any]],
    tokenizer: TextTokenizer,
    options: dict[str, Any],
    skipped: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Write a dataset as a whole: `folder` appears complete, or stays what it was.

    Args:
        folder: Where it goes; a dataset that is there is replaced.
        splits: "train", "validation" and, where there is one, "test".
        sources: A dict for each source, in the order of their numbers, with at least its `name`.
        tokenizer: What the ids mean.
        options: The settings that made it, for the manifest.
        skipped: Records that were left out, for skipped.jsonl.

    Returns:
        The manifest.
    """
    with atomic_folder(folder) as temporary:
        (temporary / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        if skipped:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
            (temporary / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
        for name, split in splits.items():
            (temporary / name).mkdir()
            for array in ARRAYS:
                save_npy(temporary / name / f"{array}.npy", getattr(split, array))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "row_length": splits["train"].row_length,
            "versions": versions(),
            "vocabulary_size": tokenizer.vocabulary_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "tokenizer_sha256": tokenizer.sha256,
            "content_sha256": content_hash(splits, [source["name"] for source in sources], tokenizer),
            "options": options,
            "sources": sources,
            "largest_ids": {name: _largest(split) for name, split in splits.items()},
            "files": {
                path.relative_to(temporary).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
                for path in files
            },
        }
        write_manifest_json(temporary / "manifest.json", manifest)
    return manifest


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries that decide a dataset's bytes."""
    from importlib.metadata import version

    return {"indraquantum": __version__} | {name: version(name) for name in ("tokenizers", "numpy", "pyarrow")}


def open_dataset(
    field: str, path: str | Path, tokenizer: str | None = None, *, verify: bool = False
) -> PreparedDataset:
    """Open a prepared folder (memory-mapped, in milliseconds whatever its size) or a pickle of padded rows.

    Args:
        field: The option to name in an error.
        path: The folder, or the pickle.
        tokenizer: Needed for a pickle, which carries none; for a folder it must be the folder's own.
        verify: Read a folder's every byte first, about a second for a gigabyte; a pickle is always read as a whole.

    Raises:
        UserError: missing, of another format or version, incomplete, ids beyond the vocabulary, another tokenizer. Of
            a folder's arrays only names, sizes, types and ends are looked at unless `verify` is set.
    """
    path = Path(path)
    if path.is_dir():
        if verify and is_dataset(path):
            _verify_bytes(field, path)
        dataset = _open_folder(field, path, tokenizer)
        if verify:
            _verify(field, path, dataset)
        return dataset
    if not path.exists():
        raise UserError(field, path, "does not exist; make it with `indra prepare`")
    from indraquantum.data.padded import open_pickle

    return open_pickle(field, path, tokenizer)


def is_dataset(folder: Path) -> bool:
    """Whether `folder` holds a prepared dataset of any version."""
    try:
        manifest = read_json("", folder / "manifest.json")
    except UserError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _open_folder(field: str, folder: Path, tokenizer_name: str | None) -> PreparedDataset:
    manifest = read_dataset_manifest(field, folder)
    present = [name for name in SPLITS if name != "test" or name in manifest["largest_ids"]]
    for name in ("tokenizer.json", *(f"{name}/{array}.npy" for name in present for array in ARRAYS)):
        if name not in manifest["files"]:
            raise UserError(field, folder / "manifest.json", f"is damaged: its files lack {name}")
    for name, facts in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else "nothing"
        if size != facts["bytes"]:
            raise UserError(field, file, f"is damaged: {facts['bytes']} bytes expected, {size} found")
    tokenizer = TextTokenizer.from_manifest(field, folder / "tokenizer.json", manifest)
    if tokenizer_name is not None:
        given = load_tokenizer("--tokenizer", tokenizer_name)
        require_same_tokenizer("--tokenizer", tokenizer_name, "must be the dataset's own", tokenizer, given)
    names = tuple(source["name"] for source in manifest["sources"])
    splits = {}
    for name in present:
        arrays = {array: _load(field, folder / name / f"{array}.npy") for array in ARRAYS}
        splits[name] = Split(**arrays, row_length=manifest["row_length"], padding_id=tokenizer.eos_id)
        check_shapes(field, folder / name, splits[name])
        _check_largest(field, folder / name, manifest["largest_ids"][name], tokenizer.vocabulary_size)
    return PreparedDataset(
        splits["train"],
        splits["validation"],
        manifest["row_length"],
        names,
        tokenizer,
        manifest["content_sha256"],
        manifest,
        splits.get("test"),
    )


def _load(field: str, file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(field, file, f"is damaged ({error})") from None


def _largest(split: Split) -> int:
    return max(int(part.max()) for part in chunks(split.tokens))


def _needer(field: str, where: object) -> Callable[[bool, str], None]:
    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(field, where, f"is damaged: {what}")

    return need


def _check_largest(field: str, where: object, largest: int, vocabulary_size: int) -> None:
    if largest >= vocabulary_size:
        raise UserError(field, where, f"holds token id {largest}; ids must be below the vocabulary's {vocabulary_size}")


def check_shapes(field: str, where: object, split: Split) -> None:
    """Check types, shapes and ends of the arrays, which takes the same time for any size.

    Raises:
        UserError: naming what is wrong; `field` is the option and `where` the place to name.
    """
    need = _needer(field, where)
    offsets, pieces, rows = split.document_offsets, split.pieces, split.row_pieces
    need(split.tokens.dtype in DTYPES["tokens"], "tokens must be uint16 or uint32")
    need(all(getattr(split, name).dtype in DTYPES[name] for name in ARRAYS), "an array has the wrong type")
    dimensions = [getattr(split, name).ndim for name in ARRAYS]
    need(dimensions == [1, 1, 1, 1, 2, 1] and pieces.shape[1] == 2, "an array has the wrong shape")
    need(len(offsets) > 1 and len(rows) > 1, "it holds no documents")
    need(offsets[0] == 0 and offsets[-1] == len(split.tokens), "documents do not cover the tokens")
    need(len(split.document_sources) == len(offsets) - 1, "documents and their sources differ in number")
    need(len(split.document_numbers) in (0, len(offsets) - 1), "documents and their numbers differ in number")
    need(rows[0] == 0 and rows[-1] == len(pieces), "rows do not cover the pieces")


def check_split(field: str, where: object, split: Split, vocabulary_size: int, num_sources: int) -> None:
    """Check that the arrays fit together and that every id is one of the vocabulary.

    Raises:
        UserError: naming what is wrong; `field` is the option and `where` the place to name.
    """
    check_shapes(field, where, split)
    need = _needer(field, where)
    offsets, pieces, rows = split.document_offsets, split.pieces, split.row_pieces
    need(bool((np.diff(offsets) > 0).all()), "a document is empty")
    need(int(split.document_sources.max()) < num_sources, "a document's source is unknown")
    need(bool((np.diff(rows) > 0).all()), "rows do not cover the pieces")
    need(bool((pieces[:, 0] >= 0).all() and (pieces[:, 1] > 0).all()), "a piece is empty or out of range")
    ends = pieces.sum(axis=1)
    need(bool((ends <= len(split.tokens)).all()), "a piece is out of range")
    need(bool((ends <= offsets[split.piece_documents + 1]).all()), "a piece crosses a document's end")
    need(int(pieces[:, 1].sum()) == len(split.tokens), "pieces do not cover the tokens")
    need(int(np.diff(split.row_token_offsets).max()) <= split.row_length, "a row is longer than row_length")
    _check_largest(field, where, _largest(split), vocabulary_size)


def _check_control_tokens(field: str, where: object, split: Split, tokenizer: TextTokenizer) -> None:
    need = _needer(field, where)
    first, behind = split.document_offsets[:-1], split.document_offsets[1:]
    if tokenizer.bos_id is not None:
        begin = (split.tokens[first] == tokenizer.bos_id).all()
        need(bool(begin), f"a document does not begin with bos_id {tokenizer.bos_id}")
    end = (split.tokens[behind - 1] == tokenizer.eos_id).all()
    need(bool(end), f"a document does not end with eos_id {tokenizer.eos_id}")


def _verify_bytes(field: str, folder: Path) -> None:
    """Check the SHA-256 of the manifest and of every file, before anything reads them; the first wrong one is named."""
    check_manifest_json(field, folder / "manifest.json")
    for name, facts in read_dataset_manifest(field, folder)["files"].items():
        if (folder / name).is_file() and sha256_of(folder / name) != facts["sha256"]:
            raise UserError(field, folder / name, "is damaged: its SHA-256 is not the manifest's")


def _verify(field: str, folder: Path, dataset: PreparedDataset) -> None:
    """Check how the arrays and the tokenizer fit together; the first file that is wrong is named."""
    tokenizer = dataset.tokenizer
    rebuilt = TextTokenizer(tokenizer.backend, tokenizer.bos_id, tokenizer.eos_id)
    for key in ("sha256", "vocabulary_size"):
        if getattr(rebuilt, key) != getattr(tokenizer, key):
            raise UserError(field, folder / "manifest.json", f"is damaged: {key} is not the tokenizer's")
    for key, control in (("bos_id", tokenizer.bos_id), ("eos_id", tokenizer.eos_id)):
        if control is not None and tokenizer.backend.id_to_token(control) is None:
            raise UserError(field, folder / "manifest.json", f"is damaged: {key} {control} is no token")
    for name, split in dataset.splits.items():
        check_split(field, folder / name, split, tokenizer.vocabulary_size, len(dataset.source_names))
        _check_control_tokens(field, folder / name, split, tokenizer)
    if content_hash(dataset.splits, dataset.source_names, tokenizer) != dataset.content_sha256:
        raise UserError(field, folder / "manifest.json", "is damaged: content_sha256 is not the arrays'")
