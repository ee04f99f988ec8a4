"""Finds a teacher's files: a folder, a GGUF file, or a model of the Hugging Face hub, which is downloaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from indraquantum.data.gguf_file import SUFFIX, GgufFile, is_gguf, open_gguf
from indraquantum.errors import UserError
from indraquantum.files import NOT_ITS_SUM, damaged_file, read_json, read_sums, sha256_of
from indraquantum.teacher.gguf_teacher import check_gguf

if TYPE_CHECKING:
    from indraquantum.data.prepared import PreparedDataset

_REMEDY = "download the teacher (config.json, *.safetensors, tokenizer.json) and give its folder with --teacher FOLDER"
_FILES = ["*.json", "*.safetensors", "tokenizer*"]


@dataclass(frozen=True)
class TeacherFiles:
    """The files of a teacher on this machine."""

    field: str  # the option that named it
    name: str  # as given
    folder: Path
    revision: str | None  # commit on the hub; None for local files
    gguf: GgufFile | None = None  # if one file in the folder is the teacher

    @property
    def tokenizer(self) -> str:
        """What to load its tokenizer from."""
        return str(self.gguf.path if self.gguf else self.folder)

    def weight_files(self) -> list[Path]:
        """Return the files of weights: safetensors, or torch's own format if there are none.

        Raises:
            UserError: there are no weights.
        """
        for pattern in ("*.safetensors", "*.bin"):
            if files := sorted(self.folder.glob(pattern)):
                return files
        raise UserError(self.field, self.name, f"has no model weights; {_REMEDY}")

    def sha256(self) -> str:
        """Return the hex SHA-256 over the configuration's values and every byte of the weights.

        For a GGUF file it is the file's own.

        Raises:
            UserError: the configuration can't be read, or a file does not match SHA256SUMS beside it.
        """
        if self.gguf:
            if damaged_file(self.folder, [self.gguf.path.name]) is not None:
                raise UserError(self.field, self.gguf.path, NOT_ITS_SUM)
            return sha256_of(self.gguf.path)
        if (name := damaged_file(self.folder, ["config.json"])) is not None:
            raise UserError(self.field, self.folder / name, NOT_ITS_SUM)
        config = read_json(self.field, self.folder / "config.json")
        if not isinstance(config, dict):
            raise UserError(self.field, self.folder / "config.json", "must be a model's configuration")
        about = {key: config[key] for key in config.keys() - {"transformers_version", "_name_or_path"}}
        weights, stated = {path.name: sha256_of(path) for path in self.weight_files()}, read_sums(self.folder)
        for name, sha256 in weights.items():
            if stated.get(name, sha256) != sha256:
                raise UserError(self.field, self.folder / name, NOT_ITS_SUM)
        return hashlib.sha256(json.dumps([about, weights], sort_keys=True).encode()).hexdigest()


def is_hub_id(name: str) -> bool:
    """Return whether `name` is no file and no folder of this machine, but may be an id of the Hugging Face hub."""
    before, _, revision = name.partition("@")
    slashes = before.count("/") if revision.startswith("refs/") else name.count("/")
    path_like = slashes > 1 or name.startswith((".", "~", "/"))
    return not (Path(name).exists() or is_gguf(name) or path_like)


def find_teacher(field: str, name: str, *, weights: bool = True) -> TeacherFiles:
    """Find a teacher. A hub id is downloaded, or taken from the hub's cache.

    Args:
        field: the option to name in an error.
        name: a folder in Hugging Face's format, a GGUF file, or a hub id.
        weights: whether to download the weights too, or only what describes the model.

    Raises:
        UserError: there is no such folder, no network, no model in it, or a GGUF file that can't be used.
    """
    folder, revision = Path(name), None
    if is_gguf(name) and not folder.is_dir():
        file = open_gguf(field, folder)
        check_gguf(field, file)
        return TeacherFiles(field, name, folder.parent, None, file)
    if not folder.is_dir():
        if not is_hub_id(name):
            raise UserError(field, name, f"must be a folder with a model, a .gguf file, or a hub id; {_REMEDY}")
        from indraquantum.data.download import hub_files

        folder = hub_files(field, name, _FILES if weights else ["*.json"], "model", _REMEDY)
        if weights and not list(folder.glob("*.safetensors")):
            folder = hub_files(field, name, [*_FILES, "*.bin"], "model", _REMEDY)
        revision = folder.name  # the hub's cache names a snapshot's folder by its commit
    if not (folder / "config.json").is_file():
        if files := sorted(folder.glob(f"*{SUFFIX}")):
            raise UserError(field, name, f"has no config.json; to use its GGUF file, give {files[0]}")
        raise UserError(field, name, f"has no config.json; {_REMEDY}")
    return TeacherFiles(field, name, folder, revision)


def check_tokenizer(files: TeacherFiles, dataset: PreparedDataset) -> None:
    """Refuse a teacher whose ids mean other tokens than the dataset's.

    Raises:
        UserError: its tokenizer is not the dataset's; the message says where they differ.
    """
    from indraquantum.data.same_tokenizer import require_same_tokenizer
    from indraquantum.data.tokenizer import load_tokenizer

    theirs = load_tokenizer(files.field, files.tokenizer)
    require_same_tokenizer(files.field, files.name, "must have the dataset's tokenizer", dataset.tokenizer, theirs)
