"""Checkpoints: a `.pt` file of tensors and plain values with a manifest. They are written atomically and verified.

A checkpoint is complete: it holds weights, optimiser, step, settings and the tokenizer, so that `indra test` needs
nothing else. `save_checkpoint` writes the `.pt` under a temporary name, fsyncs it and renames it. Then it writes the
manifest (size, SHA-256, step) in the same way. torch.load does not notice a flipped bit, so `load_checkpoint` first
checks the SHA-256. If a `.pt` was copied without its manifest, it checks the checksums of the zip parts instead. They
do not cover the padding between the parts, which holds no data.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from indraquantum.errors import UserError
from indraquantum.files import atomic_file, fsync_folder, names_aside, not_written, sha256_of, write_text
from indraquantum.progress import warn

FORMAT = "indraquantum-checkpoint"
FORMAT_VERSION = 4
STUDENT_TYPE = "indraquantum"  # IndraQuantumConfig.model_type, without the import of transformers
BEST_NAME = "checkpoint_v4_best.pt"
NAME = re.compile(r"checkpoint_v4_(epoch|step)_(\d+)\.pt")
# What zipfile and torch.load raise for files that are cut, damaged or not ours.
MALFORMED = (
    zipfile.BadZipFile, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    OverflowError, struct.error,
)  # fmt: skip
MUST = "must be a checkpoint that `indra train` wrote"


class DamagedCheckpoint(UserError):
    """A checkpoint is not as it was written. If it can't be read at present, that is another UserError."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file: tensors and plain values only."""

    model_config: dict[str, Any]  # IndraQuantumConfig.to_dict()
    model: dict[str, torch.Tensor]  # state_dict
    average: dict[str, torch.Tensor]  # moving average of the trainable weights; empty if none is kept
    optimizer: dict[str, Any]  # state_dict
    step: int  # optimiser steps done
    tokens: int  # real tokens seen
    finished: bool  # whether the run had finished
    pending: dict[str, Any] | None  # metrics of this step if its evaluation was interrupted; resume completes them
    guard: dict[str, Any]  # what the collapse guard has seen
    best: dict[str, Any]  # the best evaluation so far, see run.BestHeldOut
    loss_scale: dict[str, Any]  # state of float16's loss scale; empty for the other formats
    settings: dict[str, Any]  # what decides the run, see run.run_identity
    tokenizer: dict[str, Any]  # json, bos_id (None if documents begin with their text), eos_id
    # The SHA-256 of each shard of signals, by the SHA-256 of all; see signals.shards_of. Earlier versions had none.
    signal_shards: dict[str, list[str]] = field(default_factory=dict)


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return the path of the checkpoint of `epoch`, counted from 1."""
    return folder / f"checkpoint_v4_epoch_{epoch}.pt"


def step_checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the step checkpoint of `step`."""
    return folder / f"checkpoint_v4_step_{step}.pt"


def manifest_path(path: Path) -> Path:
    """Return the path of the manifest of the checkpoint at `path`."""
    return path.with_suffix(".json")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` atomically. A crash at any point leaves either the old file or the new one.

    Raises:
        UserError: it can't be written (disk full, read-only, I/O error); the old file is unharmed.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **vars(checkpoint)}, buffer)
    content = buffer.getbuffer()
    manifest = manifest_text(path.name, len(content), hashlib.sha256(content).hexdigest(), checkpoint.step)
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
            # An old manifest does not fit the new file. Without a manifest, both the old and the new file are valid.
            manifest_path(path).unlink(missing_ok=True)
        write_text(manifest_path(path), manifest)
    except OSError as error:
        raise not_written("--output", path, len(content), error, "; earlier checkpoints are unharmed") from None


def manifest_text(name: str, size: int, sha256: str, step: int) -> str:
    """Return the exact text of the manifest. Verification compares it byte by byte, so it finds any change."""
    return json.dumps({"format": FORMAT, "file": name, "bytes": size, "sha256": sha256, "step": step}, indent=2) + "\n"


def load_checkpoint(field: str, path: Path) -> Checkpoint:
    """Verify and read a checkpoint, without running code from the file.

    Raises:
        DamagedCheckpoint: `path` is damaged, or nothing that this program wrote; `field` is the option to name.
        UserError: it is missing or can't be read at present, or another version wrote it.
    """
    manifest = None
    try:
        manifest = _verify(field, path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:  # which is a ValueError
        raise
    except (OSError, MemoryError, UnpicklingError, *MALFORMED) as error:
        raise _not_loaded(field, path, error, verified=manifest is not None) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpoint(field, path, MUST)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(field, path, f"{MUST} (format version {FORMAT_VERSION}, not {content.get('format_version')})")
    content = {"signal_shards": {}} | content  # a newer part
    if missing := sorted(Checkpoint.__annotations__.keys() - content.keys()):
        raise DamagedCheckpoint(field, path, f"{MUST} (it lacks {missing[0]})")
    checkpoint = Checkpoint(**{name: content[name] for name in Checkpoint.__annotations__})
    if manifest is not None and manifest["step"] != checkpoint.step:
        allowed = f"is damaged: step {manifest['step']}, not {checkpoint.step}"
        raise DamagedCheckpoint(field, manifest_path(path), allowed)
    return checkpoint


def _not_loaded(field: str, path: Path, error: Exception, *, verified: bool) -> UserError:
    """Return the error for a checkpoint that can't be loaded: it is damaged, or can't be read at present.

    Args:
        field: the option to name.
        path: the file.
        error: what went wrong.
        verified: whether the SHA-256 has shown that the bytes are those that were written.
    """
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # zipfile seeks to where damaged bytes point
        return UserError(field, path, f"{MUST} ({error.strerror})")
    if isinstance(error, UnpicklingError):
        kind = UserError if verified else DamagedCheckpoint
        return kind(field, path, f"{MUST} (it holds more than tensors and plain values)")
    if verified or isinstance(error, MemoryError) or "allocat" in str(error):
        return UserError(field, path, f"{MUST} (it can't be loaded: {_first_line(error) or 'memory ran out'})")
    return DamagedCheckpoint(field, path, f"{MUST} (incomplete or damaged: {_first_line(error)})")


def require_student(field: str, path: Path, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint at `path` is of an IndraQuantumPhase2.

    Raises:
        UserError: it is of another model, such as a teacher; `field` is the option to name.
    """
    require_model_type(field, path, checkpoint, STUDENT_TYPE)


def require_model_type(field: str, path: Path, checkpoint: Checkpoint, model_type: str) -> None:
    """Check that the checkpoint at `path` is of a model of `model_type`, as its configuration calls it.

    Raises:
        UserError: it is of another type; `field` is the option to name.
    """
    there = checkpoint.model_config.get("model_type", STUDENT_TYPE)
    if there != model_type:
        raise UserError(field, path, f"must be a checkpoint of {model_type}, not of {there}")


def _verify(field: str, path: Path) -> dict[str, Any] | None:
    """Check the bytes of `path` and return its manifest. Without one, check the zip's checksums and return None."""
    try:
        text = manifest_path(path).read_bytes()
    except FileNotFoundError:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise DamagedCheckpoint(field, path, f"{MUST} (its part {part} is damaged)") from None
        return None
    size, actual = path.stat().st_size, sha256_of(path)
    try:
        manifest = json.loads(text)
        step, expected, expected_size = (manifest[name] for name in ("step", "sha256", "bytes"))
    except (ValueError, KeyError, TypeError):
        raise _not_as_written(field, path) from None
    if (size, actual) != (expected_size, expected):
        found = f"{size} bytes, sha256 {actual}; its manifest says {expected_size} bytes, sha256 {expected}"
        raise DamagedCheckpoint(field, path, f"{MUST} (damaged: {found})")
    if text != manifest_text(path.name, size, actual, step).encode():
        raise _not_as_written(field, path)
    return manifest


def _not_as_written(field: str, path: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(field, manifest_path(path), "is damaged: it is not the manifest that was written")


@dataclass(frozen=True)
class Found:
    """What `newest_checkpoint` found."""

    path: Path
    checkpoint: Checkpoint


def checkpoints_in(folder: Path, step_of_epoch: Callable[[int], int]) -> list[tuple[int, Path]]:
    """Return the checkpoints of `folder`, valid or not, with the steps of their names, newest first.

    `step_of_epoch` returns the step at which an epoch, counted from 1, ends.
    """
    found = []
    for path in folder.glob("checkpoint_v4_*.pt"):
        if match := NAME.fullmatch(path.name):
            epoch, number = match[1] == "epoch", int(match[2])
            found.append((step_of_epoch(number) if epoch else number, epoch, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path, step_of_epoch: Callable[[int], int]) -> Found | None:
    """Return the newest valid checkpoint of `folder`, or None if there is no checkpoint. Warn once about damaged ones.

    Damaged ones are set aside. One that can't be read at present is not: the run would go back and lose its steps.

    Raises:
        UserError: there are checkpoints, and all are damaged, or a newer one can't be read at present.
    """
    passed: list[tuple[Path, DamagedCheckpoint]] = []
    newest: Found | None = None
    for step, path in checkpoints_in(folder, step_of_epoch):
        # After a run was extended, the checkpoint at its former end may have the name of an epoch that now ends later.
        if newest is not None and step <= newest.checkpoint.step:
            break
        try:
            found = Found(path, load_checkpoint("--output", path))
        except DamagedCheckpoint as error:
            passed.append((path, error))
            continue
        except UserError as error:
            allowed = f"{error.allowed}; it was left as it is. To resume from an earlier one, use --resume PATH"
            raise UserError(error.field, error.value, allowed) from None
        if newest is None or found.checkpoint.step > newest.checkpoint.step:
            newest = found
    if passed and newest is not None:
        names = ", ".join(path.name for path, _ in passed)
        warn(f"warning: skipped damaged checkpoints: {names}. Using {newest.path.name}. First error: {passed[0][1]}")
        set_aside(path for path, _ in passed)
    elif passed:
        way_out = "remove it to start over, or give another --output"
        raise UserError("--output", folder, f"holds no valid checkpoint: {way_out}. First error: {passed[0][1]}")
    return newest


def set_aside(paths: Iterable[Path]) -> None:
    """Rename checkpoints, so that no run resumes from them. None that was set aside earlier is overwritten."""
    for path in paths:
        parts = (manifest_path(path), path)
        for part, aside in zip(parts, names_aside(*parts), strict=True):
            if part.exists():
                os.replace(part, aside)
        fsync_folder(path.parent)


def prune_step_checkpoints(folder: Path, keep_last: int, keep: Callable[[int], bool] = lambda step: False) -> None:
    """Remove step checkpoints, except the newest `keep_last` and those whose step `keep` accepts."""
    steps = [path for step, path in checkpoints_in(folder, int) if "_step_" in path.name and not keep(step)]
    for path in steps[keep_last:]:
        manifest_path(path).unlink(missing_ok=True)
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left behind: temporary files, and manifests without a checkpoint."""
    for path in folder.glob(".checkpoint_v4_*.tmp"):
        path.unlink()
    for path in folder.glob("checkpoint_v4_*.json"):
        if not path.with_suffix(".pt").exists():
            path.unlink()


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
