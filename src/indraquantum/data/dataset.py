"""A prepared dataset on the disk: write one, and open a folder (memory-mapped) or a pickle of padded rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from indraquantum.data.dataset_manifest import FORMAT, FORMAT_VERSION, is_dataset, read_dataset_manifest
from indraquantum.data.held_out import SPLITS
from indraquantum.data.large_arrays import save_npy
from indraquantum.data.padded import open_pickle
from indraquantum.data.prepared import (
    ARRAYS,
    PreparedDataset,
    check_control_tokens,
    check_largest,
    check_shapes,
    check_split,
    content_hash,
    largest_id,
)
from indraquantum.data.same_tokenizer import require_same_tokenizer
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import atomic_folder, check_manifest_json, sha256_of, write_manifest_json
from indraquantum.versions import versions


def write_dataset(
    folder: Path,
    splits: dict[str, Split],
    sources: list[dict[str, Any]],
    tokenizer: TextTokenizer,
    options: dict[str, Any],
    skipped: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Write a dataset as a whole: `folder` holds the complete dataset afterwards, or is unchanged.

    Args:
        folder: Where to write. A dataset that is there is overwritten.
        splits: "train", "validation" and, if there is one, "test".
        sources: A dict for each source, in the order of their numbers, with at least its `name`.
        tokenizer: The tokenizer of the ids.
        options: The settings of the preparation, for the manifest.
        skipped: Records that were skipped, for skipped.jsonl.

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
            "versions": versions("tokenizers", "numpy", "pyarrow"),  # which decide the bytes
            "vocabulary_size": tokenizer.vocabulary_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "tokenizer_sha256": tokenizer.sha256,
            "content_sha256": content_hash(splits, [source["name"] for source in sources], tokenizer),
            "options": options,
            "sources": sources,
            "largest_ids": {name: largest_id(split) for name, split in splits.items()},
            "files": {
                path.relative_to(temporary).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
                for path in files
            },
        }
        write_manifest_json(temporary / "manifest.json", manifest)
    return manifest


def open_dataset(
    field: str, path: str | Path, tokenizer: str | TextTokenizer | None = None, *, verify: bool = False
) -> PreparedDataset:
    """Open a prepared folder or a pickle of padded rows.

    A folder is memory-mapped, which takes milliseconds for any size.

    Args:
        field: The option to name in an error.
        path: The folder, or the pickle.
        tokenizer: The tokenizer of a pickle, which has none of its own, or the name of its folder, file or hub id. For
            a folder it must be the folder's own.
        verify: Check every byte of a folder first, at about a second for a gigabyte. A pickle is always read as a
            whole.

    Raises:
        UserError: the dataset is missing or incomplete, has another format or version, holds ids outside the
            vocabulary, or belongs to another tokenizer. Without `verify` only the names, sizes, types and ends of a
            folder's arrays are checked.
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
    return open_pickle(field, path, tokenizer)


def _open_folder(field: str, folder: Path, wanted: str | TextTokenizer | None) -> PreparedDataset:
    manifest = read_dataset_manifest(field, folder)
    present = [name for name in SPLITS if name != "test" or name in manifest["largest_ids"]]
    for name in ("tokenizer.json", *(f"{name}/{array}.npy" for name in present for array in ARRAYS)):
        if name not in manifest["files"]:
            raise UserError(field, folder / "manifest.json", f"is damaged: its list of files lacks {name}")
    for name, facts in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            found = "it is missing" if size is None else f"it has {size}"
            raise UserError(field, file, f"is damaged: it must have {facts['bytes']} bytes, but {found}")
    tokenizer = TextTokenizer.from_manifest(field, folder / "tokenizer.json", manifest)
    if wanted is not None:
        given = load_tokenizer("--tokenizer", wanted) if isinstance(wanted, str) else wanted
        require_same_tokenizer("--tokenizer", wanted, "must be the tokenizer of the dataset", tokenizer, given)
    names = tuple(source["name"] for source in manifest["sources"])
    splits = {}
    for name in present:
        arrays = {array: _load(field, folder / name / f"{array}.npy") for array in ARRAYS}
        splits[name] = Split(**arrays, row_length=manifest["row_length"], padding_id=tokenizer.eos_id)
        check_shapes(field, folder / name, splits[name])
        check_largest(field, folder / name, manifest["largest_ids"][name], tokenizer.vocabulary_size)
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


def _verify_bytes(field: str, folder: Path) -> None:
    """Check the SHA-256 of the manifest and of every file before anything else reads them."""
    check_manifest_json(field, folder / "manifest.json")
    for name, facts in read_dataset_manifest(field, folder)["files"].items():
        if (folder / name).is_file() and sha256_of(folder / name) != facts["sha256"]:
            raise UserError(field, folder / name, "is damaged: its SHA-256 is not the one in the manifest")


def _verify(field: str, folder: Path, dataset: PreparedDataset) -> None:
    """Check that the arrays and the tokenizer fit together."""
    tokenizer = dataset.tokenizer
    rebuilt = TextTokenizer(tokenizer.backend, tokenizer.bos_id, tokenizer.eos_id)
    for key in ("sha256", "vocabulary_size"):
        if getattr(rebuilt, key) != getattr(tokenizer, key):
            raise UserError(field, folder / "manifest.json", f"is damaged: its {key} is not that of the tokenizer")
    for key, control in (("bos_id", tokenizer.bos_id), ("eos_id", tokenizer.eos_id)):
        if control is not None and tokenizer.backend.id_to_token(control) is None:
            raise UserError(
                field, folder / "manifest.json", f"is damaged: its {key} {control} is not a token of the vocabulary"
            )
    for name, split in dataset.splits.items():
        check_split(field, folder / name, split, tokenizer.vocabulary_size, len(dataset.source_names))
        check_control_tokens(field, folder / name, split, tokenizer)
    if content_hash(dataset.splits, dataset.source_names, tokenizer) != dataset.content_sha256:
        raise UserError(field, folder / "manifest.json", "is damaged: its content_sha256 is not that of the arrays")
