"""Writes a trained model for other programs: the command `indra export`.

Each form is a module of its own with a function `write`: export_transformers, export_llama, export_gguf, export_onnx,
export_page. A folder gets the model, a model card (README.md) and checksums (SHA256SUMS), completely or not at all. It
can be uploaded to the Hugging Face hub.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from indraquantum.config import ExportSettings
from indraquantum.data.system_errors import system_errors_shown
from indraquantum.errors import UserError, reason
from indraquantum.files import atomic_folder, make_folder, write_sums
from indraquantum.inference.load import Loaded, loaded_from
from indraquantum.inference.model_card import Exported, RunFacts, model_card
from indraquantum.training.checkpoint import load_checkpoint

Writer = Callable[[Loaded, Path, ExportSettings], Exported]


@dataclass(frozen=True)
class ExportReport:
    """What was written. As a string, it is what the command prints."""

    folder: Path
    use: str  # a sentence: how to use it
    address: str | None = None  # where it was uploaded to

    def __str__(self) -> str:
        uploaded = "" if self.address is None else f"\nIt was uploaded to {self.address}."
        return f"The model is in {self.folder}. {self.use}{uploaded}"


def export_checkpoint(path: Path, folder: Path, settings: ExportSettings | None = None) -> ExportReport:
    """Write the model of the checkpoint at `path` into `folder`.

    Raises:
        UserError: `path` is not a valid checkpoint, `folder` is not empty, the model has no such form, a package is
            missing, or the upload failed (then the folder is complete).
    """
    settings = settings or ExportSettings()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("FOLDER", folder, "must be new or empty")
    if folder.resolve() == Path.cwd():  # the old folder is replaced as a whole
        raise UserError("FOLDER", folder, "must not be the current folder, which is replaced as a whole")
    if path.is_dir():
        raise UserError("CHECKPOINT", path, "must be a checkpoint, not a folder")
    checkpoint = load_checkpoint("CHECKPOINT", path)
    loaded = loaded_from(path, checkpoint, torch.device("cpu"), settings.weights)
    write: Writer = importlib.import_module(f"indraquantum.inference.export_{settings.as_}").write
    make_folder("FOLDER", folder.parent)
    with system_errors_shown(folder), atomic_folder(folder) as temporary:
        exported = write(loaded, temporary, settings)
        facts = RunFacts.find(path, checkpoint, settings.logs, settings.weights)
        (temporary / "README.md").write_text(model_card(folder.resolve().name, loaded, facts, exported), "utf-8")
        write_sums(temporary)
    address = None if settings.push is None else push(folder, settings.push, settings.private)
    return ExportReport(folder, exported.use.replace("FOLDER", str(folder)), address)


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder` to `repository` of the hub, which is created if it does not exist; return its address.

    Raises:
        UserError: the hub refused, or can't be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload of indra export")
    except (HFValidationError, OfflineModeIsEnabled, HTTPError, OSError, RuntimeError) as error:  # the last: LFS
        allowed = f"must be a repository you can write to ({reason(error)}); the model is complete in {folder}"
        raise UserError("--push", repository, allowed) from None
    return str(address)
