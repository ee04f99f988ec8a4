"""Writes a checkpoint as a folder that transformers can load: the command `indra export`.

import indraquantum    # tells the Auto classes what the folder holds
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)    # see data/fast_tokenizer.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from indraquantum.data.fast_tokenizer import save_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import atomic_folder, make_folder, write_sums
from indraquantum.inference.load import ALIGNED, load


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write model and tokenizer of the checkpoint at `path` into `folder`, completely or not at all.

    Raises:
        UserError: `path` is not a valid checkpoint, or `folder` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("FOLDER", folder, "must be new or empty")
    if folder.resolve() == Path.cwd():  # the old folder is replaced as a whole
        raise UserError("FOLDER", folder, "must not be the current folder, which is replaced as a whole")
    if path.is_dir():
        raise UserError("CHECKPOINT", path, "must be a checkpoint, not a folder")
    loaded = load(path, torch.device("cpu"))
    setattr(loaded.model.config, ALIGNED, sorted(loaded.aligned or ()))
    make_folder("FOLDER", folder.parent)
    with atomic_folder(folder) as temporary:
        loaded.model.save_pretrained(temporary)
        save_tokenizer(loaded.tokenizer, temporary)
        write_sums(temporary)
