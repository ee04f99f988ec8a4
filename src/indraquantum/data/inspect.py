"""`indra data info|verify|show`: prints what a prepared dataset holds, checks it, and prints its rows as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from indraquantum.config import ShowSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.padded import checksum_path, verify_checksum
from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.split import Split
from indraquantum.errors import UserError

FIELD = "PATH"


def describe(path: Path, tokenizer: str | None = None) -> str:
    """Return a dataset's statistics as a few lines.

    Args:
        path: The prepared folder, or a pickle.
        tokenizer: The tokenizer of a pickle.

    Raises:
        UserError: it can't be opened.
    """
    dataset = open_dataset(FIELD, path, tokenizer)
    manifest = dataset.manifest
    bos_id = dataset.tokenizer.bos_id  # its text would take loading the tokenizer
    lines = [
        f"{path}: {manifest['format']} {manifest.get('format_version', '')}".rstrip(),
        f"content {dataset.content_sha256}",
        f"tokenizer {manifest['tokenizer_sha256']}, {manifest['vocabulary_size']:,} tokens; documents begin with "
        f"{'their text' if bos_id is None else f'BOS, token {bos_id}'}",
    ]
    for name, split in dataset.splits.items():
        fill = split.num_tokens / (split.num_rows * split.row_length)
        lengths = np.diff(split.document_offsets)
        lines.append(
            f"{name}: {split.num_rows:,} rows of {split.row_length}, {fill:.2%} filled; {split.num_tokens:,} tokens of "
            f"{split.num_documents:,} documents, {lengths.min():,} to {lengths.max():,} long, mean {lengths.mean():.1f}"
        )
        documents = np.bincount(split.document_sources, minlength=len(dataset.source_names))
        tokens = np.bincount(split.document_sources, weights=lengths, minlength=len(dataset.source_names))
        for number, source in enumerate(dataset.source_names):
            lines.append(f"  {source}: {documents[number]:,} documents, {int(tokens[number]):,} tokens")
    lines += [f"{source['name']}: {said}" for source in manifest["sources"] for said in _told(source)]
    for group in ("options", "versions"):
        if group in manifest:
            lines.append(f"{group}: " + ", ".join(f"{key} {value}" for key, value in manifest[group].items()))
    return "\n".join(lines)


def _told(source: dict[str, Any]) -> list[str]:
    """Return what a manifest says about how a source was read and which fields are not used."""
    counts = {kind: source.get(kind) or {} for kind in ("unused_fields", "left_out")}
    named = (
        f"{kind.replace('_', ' ')}: {', '.join(f'{name} {count:,}' for name, count in found.items())}"
        for kind, found in counts.items()
        if found
    )
    return [*source.get("notes", ()), *named]


def verify(path: Path) -> str:
    """Read every byte of a prepared folder, or of a pickle with a checksum, and return what was checked.

    Raises:
        UserError: a file is damaged, or a pickle has no checksum; the message names the first one.
    """
    if path.is_file():
        if not verify_checksum(FIELD, path):
            raise UserError(FIELD, path, f"must have its checksum in {checksum_path(path).name} beside it")
        return f"{path}: {path.stat().st_size:,} bytes, all as they were written"
    manifest = open_dataset(FIELD, path, verify=True).manifest
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    return f"{path}: {len(manifest['files'])} files, {size:,} bytes, all as they were written"


def show_rows(path: Path, settings: ShowSettings) -> str:
    """Return rows as text: a line for the row, then a line and the text for each piece.

    `<s>` and `</s>` show the control tokens. `...` shows that a document began in an earlier piece, or continues in a
    later one.

    Raises:
        UserError: the dataset can't be opened, or has no such row.
    """
    dataset = open_dataset(FIELD, path, settings.tokenizer)
    if settings.split not in dataset.splits:
        allowed = f"must be one of the dataset's splits ({', '.join(dataset.splits)})"
        raise UserError("--split", settings.split, allowed)
    split = dataset.splits[settings.split]
    if settings.first >= split.num_rows:
        allowed = f"{settings.split} has {split.num_rows:,} rows, numbered from 0"
        raise UserError("--first", settings.first, allowed)
    last = min(settings.first + settings.rows, split.num_rows)
    return "\n".join(line for row in range(settings.first, last) for line in _row_lines(dataset, split, row))


def _row_lines(dataset: PreparedDataset, split: Split, row: int) -> list[str]:
    pieces = split.pieces[split.row_pieces[row] : split.row_pieces[row + 1]]
    lines = [f"row {row}: {pieces[:, 1].sum()} of {split.row_length} positions, pieces {len(pieces)}"]
    for start, length in pieces.tolist():
        document = int(np.searchsorted(split.document_offsets, start, side="right") - 1)
        begin, end = split.document_offsets[document : document + 2].tolist()
        source = dataset.source_names[split.document_sources[document]]
        number = f" {split.document_numbers[document]}" if len(split.document_numbers) else ""
        lines.append(f"  {source}{number}, tokens {start - begin} to {start - begin + length} of {end - begin}")
        text = _text(dataset, split.tokens[start : start + length].tolist())
        text = f"{'' if start == begin else '...'}{text}{'' if start + length == end else '...'}"
        lines += [f"    {line}" for line in text.split("\n")]
    return lines


def _text(dataset: PreparedDataset, tokens: list[int]) -> str:
    """Text of a piece, its control tokens spelled out."""
    tokenizer = dataset.tokenizer
    spelled = {token: tokenizer.backend.id_to_token(token) for token in tokenizer.control_ids}
    before = spelled.get(tokens[0], "")
    after = spelled[tokens[-1]] if len(tokens) > 1 and tokens[-1] in spelled else ""
    return f"{before}{tokenizer.decode(tokens, skip_special_tokens=False)}{after}"
