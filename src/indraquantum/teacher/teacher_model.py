"""The teacher: any Hugging Face causal LM whose tokenizer is the dataset's, asked over packed rows.

Rows hold several documents, so each is kept to itself by a 4-D mask and positions that restart. Not every
architecture honours them: the first rows are compared with each document asked alone, and a teacher that
leaks gets one document at a time.

Legend: B rows, T positions, V vocabulary (the teacher's may be padded).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from indraquantum.errors import UserError
from indraquantum.files import read_json, sha256_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from indraquantum.data.dataset import PreparedDataset
    from indraquantum.data.split import Batch, Split
    from indraquantum.teacher.sampling import PositionSignals
    from indraquantum.teacher.shard_worker import Plan

_REMEDY = "download the teacher (config.json, *.safetensors, tokenizer.json) and give its folder with --teacher FOLDER"
_FILES = ["*.json", "*.safetensors", "tokenizer*"]
_LEAK = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}  # of the logits' spread; rounding stays far below


@dataclass(frozen=True)
class TeacherFiles:
    """Where a teacher lies on this machine."""

    field: str  # the option that named it
    name: str  # as given
    folder: Path
    revision: str | None  # commit on the hub; None for a local folder

    def weight_files(self) -> list[Path]:
        """The files of weights: safetensors, or torch's own where there are none.

        Raises:
            UserError: there are neither.
        """
        for pattern in ("*.safetensors", "*.bin"):
            if files := sorted(self.folder.glob(pattern)):
                return files
        raise UserError(self.field, self.name, f"has no model weights; {_REMEDY}")

    def sha256(self) -> str:
        """Hex SHA-256 over the configuration's meaning and every byte of the weights."""
        config = read_json(self.field, self.folder / "config.json")
        if not isinstance(config, dict):
            raise UserError(self.field, self.folder / "config.json", "must be a model's configuration")
        about = {key: config[key] for key in config.keys() - {"transformers_version", "_name_or_path"}}
        weights = {path.name: sha256_of(path) for path in self.weight_files()}
        return hashlib.sha256(json.dumps([about, weights], sort_keys=True).encode()).hexdigest()


def find_teacher(field: str, name: str) -> TeacherFiles:
    """Locate a teacher; one of the hub is downloaded, or taken from the hub's cache.

    Args:
        field: the option to name in an error.
        name: a folder in Hugging Face's format, or a hub id.

    Raises:
        UserError: no such folder, no network, or no model in it.
    """
    folder, revision = Path(name), None
    if not folder.is_dir():
        if folder.exists() or name.count("/") > 1 or name.startswith((".", "~", "/")):
            raise UserError(field, name, f"must be a folder with a model, or a hub id; {_REMEDY}")
        from indraquantum.data.download import hub_files

        folder = hub_files(field, name, _FILES, "model", _REMEDY)
        if not list(folder.glob("*.safetensors")):
            folder = hub_files(field, name, [*_FILES, "*.bin"], "model", _REMEDY)
        revision = folder.name  # the hub's cache names a snapshot's folder by its commit
    if not (folder / "config.json").is_file():
        raise UserError(field, name, f"has no config.json; {_REMEDY}")
    return TeacherFiles(field, name, folder, revision)


def check_tokenizer(files: TeacherFiles, dataset: PreparedDataset) -> None:
    """Refuse a teacher that means other tokens by the same ids.

    Raises:
        UserError: its tokenizer is not the dataset's; the message says where they differ.
    """
    from indraquantum.data.same_tokenizer import require_same_tokenizer
    from indraquantum.data.tokenizer import load_tokenizer

    theirs = load_tokenizer(files.field, str(files.folder))
    require_same_tokenizer(files.field, files.name, "must have the dataset's tokenizer", dataset.tokenizer, theirs)


def document_mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """Which positions see which.

    Args:
        segments_BT: (B, T) int, number of the document within its row, -1 on padding.

    Returns:
        (B, 1, T, T) bool, True at (i, j) where position i may attend to j: the same document and not later.
        Padding attends to padding, so that no row of the attention is empty.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT.tril()[:, None]


class Teacher:
    """A loaded teacher.

    Attributes:
        precision: the number format it computes in.
        packed: whether several documents go into one row; False for a teacher that leaks.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, precision: str) -> None:
        """Use `load_teacher`, which checks."""
        self.model, self.device, self.precision = model, device, precision
        self.packed = True

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the next token at each position; those at padding mean nothing.

        Returns:
            (B, T, V') on the teacher's device, in its precision.
        """
        from indraquantum.kernels.onednn import onednn_products

        with onednn_products():
            return self._packed_logits(batch) if self.packed else self._lone_logits(batch)

    def _packed_logits(self, batch: Batch) -> torch.Tensor:
        import torch

        mask_B1TT = document_mask(torch.from_numpy(batch.segments).to(self.device))
        if self.model.config._attn_implementation != "sdpa":  # eager attention adds its mask to the scores
            lowest = torch.finfo(self.model.dtype).min
            mask_B1TT = torch.zeros_like(mask_B1TT, dtype=self.model.dtype).masked_fill(~mask_B1TT, lowest)
        with torch.inference_mode():
            return self.model(
                input_ids=torch.from_numpy(batch.input_ids).to(self.device),
                attention_mask=mask_B1TT,
                position_ids=torch.from_numpy(batch.positions).to(self.device),
                use_cache=False,
            ).logits

    def _lone_logits(self, batch: Batch) -> torch.Tensor:
        """Each document by itself, without mask, padding or positions: slow, and right for any causal model."""
        import torch

        logits_BTV = None
        for row, segments_T in enumerate(batch.segments):
            for segment in range(segments_T.max() + 1):
                columns = np.flatnonzero(segments_T == segment)
                ids = torch.from_numpy(batch.input_ids[row, columns])[None].to(self.device)
                with torch.inference_mode():
                    alone_TV = self.model(input_ids=ids, use_cache=False).logits[0]
                    if logits_BTV is None:
                        logits_BTV = alone_TV.new_zeros(*batch.segments.shape, alone_TV.shape[-1])
                    logits_BTV[row, columns[0] : columns[-1] + 1] = alone_TV
        return logits_BTV

    def leaks(self, batch: Batch) -> bool:
        """Whether packed rows give other logits than their documents alone, or are not accepted at all."""
        import torch

        parameters = inspect.signature(self.model.forward).parameters
        if not {"attention_mask", "position_ids"} <= parameters.keys():
            return True
        alone_MV = self._lone_logits(batch)[batch.segments >= 0].float()
        try:
            packed_MV = self._packed_logits(batch)[batch.segments >= 0].float()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return True  # an architecture that can't take a 4-D mask says so in many ways
        spread = alone_MV.std().clamp(min=torch.finfo(torch.float32).tiny)
        return not ((packed_MV - alone_MV).abs().mean() / spread < _LEAK[self.precision])


class ModelAsker:
    """A loaded teacher that answers with signals.

    Attributes:
        precision: the number format it computes in.
        packed: whether several documents go into one row.
    """

    def __init__(self, teacher: Teacher, dataset: PreparedDataset, plan: Plan) -> None:
        """Ask `teacher` over the rows of `dataset` as `plan` says."""
        self._teacher, self._dataset, self._settings, self._identity = teacher, dataset, plan.settings, plan.manifest
        self.precision, self.packed = teacher.precision, teacher.packed

    def close(self) -> None:
        """Nothing to let go of: memory goes with the object."""

    def signals(self, split: str, rows: np.ndarray) -> PositionSignals:
        """The signals of all real positions of these rows, in their order.

        Raises:
            UserError: logits that are not finite, or too little memory.
        """
        import torch

        from indraquantum.teacher.sampling import position_signals, row_uniforms

        batch, identity = getattr(self._dataset, split).batch(rows), self._identity
        real_B = (batch.segments >= 0).sum(1)
        batch = type(batch)(*(array[:, : real_B.max()] for array in batch))
        uniforms_Nn = None
        if identity.kind == "sampled":
            pairs = zip(rows.tolist(), real_B.tolist(), strict=True)
            uniforms = [row_uniforms(identity.seed, split, row, real, identity.draws) for row, real in pairs]
            uniforms_Nn = np.concatenate(uniforms)
        places_N = np.flatnonzero(batch.segments.reshape(-1) >= 0)
        try:
            return position_signals(
                self._teacher.logits(batch),
                places_N,
                batch.labels.reshape(-1)[places_N],
                uniforms_Nn,
                identity.vocabulary_size,
                identity.temperature,
                identity.top_k,
            )
        except FloatingPointError:
            allowed = f"must give finite logits (nan or inf in {split} rows {rows[0]} to {rows[-1]})"
            raise UserError("--teacher", self._settings.teacher, allowed) from None
        except torch.OutOfMemoryError:
            allowed = f"must be below {batch.input_ids.size}: {len(rows)} rows don't fit the memory"
            raise UserError("--batch-tokens", self._settings.batch_tokens, allowed) from None


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What `--precision` means on a device; see `load_teacher`."""
    import torch

    from indraquantum.device import best_16_bits

    if device.type == "cuda" and precision == "auto":
        return best_16_bits()
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def teacher_config(files: TeacherFiles) -> PretrainedConfig:
    """The configuration of a causal LM.

    Raises:
        UserError: it is of something else.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with refused_in_one_line(files), _quiet_transformers():
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is none")
        return config


def load_teacher(
    files: TeacherFiles, dataset: PreparedDataset, device: torch.device, precision: str = "auto"
) -> Teacher:
    """Load the teacher and make sure that it can teach this dataset.

    Args:
        files: from `find_teacher`.
        dataset: what it is to teach.
        device: where it computes.
        precision: float32, bfloat16, or auto: float32 on the CPU, whatever it was saved in; bfloat16 (float16 on old
            cards) on CUDA.

    Raises:
        UserError: no causal LM, incomplete weights, fewer tokens than the dataset, or too short a context.
    """
    dtype = compute_dtype(device, precision)
    model = _load_model(files, dtype)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if vocabulary < dataset.tokenizer.vocabulary_size:
        allowed = f"must have the dataset's {dataset.tokenizer.vocabulary_size} tokens, not {vocabulary}"
        raise UserError(files.field, files.name, allowed)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(int(split.pieces[:, 1].max()) for split in (dataset.train, dataset.validation))
    if context is not None and longest > context:
        raise UserError(files.field, files.name, f"must read {longest} tokens at once, but its context is {context}")
    teacher = Teacher(model.to(device).eval().requires_grad_(False), device, str(dtype).removeprefix("torch."))
    teacher.packed = not teacher.leaks(_first_rows(dataset.train))
    return teacher


def _first_rows(split: Split) -> Batch:
    """Two rows of several documents, or just the first row where there are no such rows."""
    several = np.flatnonzero(np.diff(split.row_pieces) > 1)[:2]
    return split.batch(several if len(several) else np.arange(1))


def _load_model(files: TeacherFiles, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    with refused_in_one_line(files), _quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(files.folder, attn_implementation="sdpa", **options)
        except (ValueError, ImportError):  # the architecture has no such attention
            model, info = AutoModelForCausalLM.from_pretrained(files.folder, **options)
    if missing := sorted(info["missing_keys"]):
        allowed = f"must have all of its weights; {len(missing)} are missing, such as {missing[0]}"
        raise UserError(files.field, files.name, allowed)
    return model


@contextlib.contextmanager
def refused_in_one_line(files: TeacherFiles) -> Iterator[None]:
    """Whatever transformers says of a teacher that it can't read."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    known = (OSError, ValueError, TypeError, KeyError, AssertionError, RuntimeError, SafetensorError)
    try:
        yield
    except (*known, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(files.field, files.name, f"must be a causal LM that transformers can load ({reason})") from None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and warnings of transformers while loading: what matters is checked here and said in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
