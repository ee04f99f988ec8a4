"""Checkpoints: one `.pt` of tensors and plain values, written atomically, checked before use, never running code.

A checkpoint is complete: weights, optimiser, step, settings and the tokenizer, so that `indra test` needs nothing else.
torch.load does not notice a flipped bit; the zip checksums of the file do (all but those in padding), so they are
checked first.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from indraquantum.errors import UserError
from indraquantum.files import atomic_file

FORMAT = "indraquantum-checkpoint"
FORMAT_VERSION = 1
NAME = re.compile(r"checkpoint_v4_epoch_(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds; tensors and plain values only."""

    model_config: dict[str, Any]  # IndraQuantumConfig.to_dict()
    model: dict[str, torch.Tensor]  # state_dict
    optimizer: dict[str, Any]  # state_dict
    step: int  # optimiser steps done
    tokens: int  # real tokens seen
    finished: bool  # the run had come to its end
    settings: dict[str, Any]  # what decides the run, see loop.run_identity
    tokenizer: dict[str, Any]  # json, bos_id, eos_id


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where the checkpoint of `epoch` (from 1) stands."""
    return folder / f"checkpoint_v4_epoch_{epoch}.pt"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, atomically."""
    with atomic_file(path) as temporary:
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **vars(checkpoint)}, temporary)


def load_checkpoint(field: str, path: Path) -> Checkpoint:
    """Read and check a checkpoint; runs no code from the file.

    Raises:
        UserError: `path` is missing, damaged, or no checkpoint of this program; `field` is the option to name.
    """
    must = "must be a checkpoint_v4_epoch_N.pt that `indra train` wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(field, path, f"{must} (its part {damaged} is damaged)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(field, path, f"{must} ({error.strerror})") from None
    except (zipfile.BadZipFile, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(field, path, f"{must} (not a whole one: {_first_line(error)})") from None
    except UnpicklingError:
        raise UserError(field, path, f"{must} (it holds more than tensors and plain values)") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(field, path, must)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(field, path, f"{must} (format version {FORMAT_VERSION}, not {content.get('format_version')})")
    return Checkpoint(**{name: content[name] for name in Checkpoint.__annotations__})


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of the last epoch in `folder` that is whole, or None; damaged ones are passed over, and said."""
    found = sorted(((int(m[1]), p) for p in folder.glob("*.pt") if (m := NAME.fullmatch(p.name))), reverse=True)
    for _, path in found:
        try:
            return load_checkpoint("--output", path)
        except UserError as error:
            print(f"warning: passed over: {error}")
    return None


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
