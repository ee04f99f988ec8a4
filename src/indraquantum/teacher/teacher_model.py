"""The teacher: any Hugging Face causal LM whose tokenizer is the dataset's, asked over packed rows.

Rows hold several documents, so each is kept to itself by masks and positions that restart. Not every architecture
honours them: rows that can show it are compared with each document asked alone (checks.py), and a teacher whose logits
differ gets one document at a time.

Legend: B rows, T positions, V vocabulary (the teacher's may be padded).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from indraquantum.errors import UserError
from indraquantum.files import NOT_ITS_SUM, damaged_file, read_json, read_sums, sha256_of
from indraquantum.teacher.checks import is_causal, packs_right, pieces_of, telling_rows
from indraquantum.teacher.refusals import quiet_transformers, refused_in_one_line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from indraquantum.data.dataset import PreparedDataset
    from indraquantum.data.split import Batch
    from indraquantum.teacher.sampling import PositionSignals
    from indraquantum.teacher.shard_worker import Plan

_REMEDY = "download the teacher (config.json, *.safetensors, tokenizer.json) and give its folder with --teacher FOLDER"
_FILES = ["*.json", "*.safetensors", "tokenizer*"]


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
        """Hex SHA-256 over the configuration's meaning and every byte of the weights.

        Raises:
            UserError: the configuration is none, or a file is not what SHA256SUMS beside it says.
        """
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
        vocabulary_size: the dataset's tokens; its own may be padded to more.
        packed: whether several documents go into one row; False for a teacher that would mix them.
        layered: whether some layers see only a part of what came before (windows, chunks), so that packed rows need
            a mask for each kind of layer.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, precision: str, vocabulary_size: int) -> None:
        """Use `load_teacher`, which checks."""
        self.model, self.device, self.precision = model, device, precision
        self.vocabulary_size = vocabulary_size
        self.packed, self.layered = True, _is_layered(model.config.get_text_config())

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the next token at each position; those at padding mean nothing.

        Returns:
            (B, T, V') on the teacher's device, in its precision.
        """
        from indraquantum.kernels.onednn import onednn_products

        with onednn_products():
            return self.packed_logits(batch) if self.packed else self._lone_logits(batch)

    def packed_logits(self, batch: Batch) -> torch.Tensor:
        """As `logits`, several documents a row, whether or not the teacher keeps them apart."""
        import torch

        positions_BT = torch.from_numpy(batch.positions).to(self.device)
        with torch.inference_mode():
            return self.model(
                input_ids=torch.from_numpy(batch.input_ids).to(self.device),
                attention_mask=self._layer_masks(positions_BT) if self.layered else self._mask(batch),
                position_ids=positions_BT,
                use_cache=False,
            ).logits

    def _mask(self, batch: Batch) -> torch.Tensor:
        """One mask for all layers, (B, 1, T, T)."""
        import torch

        mask_B1TT = document_mask(torch.from_numpy(batch.segments).to(self.device))
        if self.model.config._attn_implementation == "sdpa":
            return mask_B1TT
        lowest = torch.finfo(self.model.dtype).min  # eager attention adds its mask to the scores
        return torch.zeros_like(mask_B1TT, dtype=self.model.dtype).masked_fill(~mask_B1TT, lowest)

    def _layer_masks(self, positions_BT: torch.Tensor) -> dict[str, torch.Tensor | None] | torch.Tensor | None:
        """A mask for each kind of layer, as transformers makes them; it sees documents by positions that restart."""
        import torch
        from transformers.masking_utils import create_masks_for_generate

        shape_of_embeddings = torch.empty(*positions_BT.shape, 1, dtype=self.model.dtype, device=self.device)
        return create_masks_for_generate(self.model.config, shape_of_embeddings, None, None, positions_BT)

    def _lone_logits(self, batch: Batch) -> torch.Tensor:
        """Each document by itself, without mask, padding or positions: slow, and right for any causal model."""
        logits_BTV = None
        for row, columns in pieces_of(batch):
            alone_TV = self._alone(batch.input_ids[row, columns])
            if logits_BTV is None:
                logits_BTV = alone_TV.new_zeros(*batch.segments.shape, alone_TV.shape[-1])
            logits_BTV[row, columns] = alone_TV
        return logits_BTV

    def alone(self, ids_T: np.ndarray) -> torch.Tensor:
        """Logits of the dataset's tokens for one document by itself, (T, V): what is right by definition."""
        return self._alone(ids_T)[:, : self.vocabulary_size]

    def _alone(self, ids_T: np.ndarray) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.from_numpy(ids_T)[None].to(self.device), use_cache=False).logits[0]


def _is_layered(config: PretrainedConfig) -> bool:
    """Whether some layer sees less of a document than all that came before."""
    if layer_types := getattr(config, "layer_types", None):
        return any(kind != "full_attention" for kind in layer_types)
    return any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))


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
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    about = read_json(files.field, files.folder / "config.json")
    if isinstance(about, dict) and about.get("auto_map") and about.get("model_type") not in CONFIG_MAPPING:
        allowed = f"must be of an architecture that transformers has; {about.get('model_type')} brings its own code"
        raise UserError(files.field, files.name, f"{allowed}, which this program never runs")
    with refused_in_one_line(files), quiet_transformers():
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{config.model_type} is none")
        if config.is_encoder_decoder:
            raise ValueError(f"{config.model_type} has an encoder, which needs a text of its own")
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
    model = _load_model(files, dtype, device)
    longest = max(int(split.pieces[:, 1].max()) for split in (dataset.train, dataset.validation))
    _check_sizes(files, model.config, dataset, longest)
    with refused_in_one_line(files):
        if getattr(model.config, "quantization_config", None) is None:  # a quantised one lies where it was loaded
            model = model.to(device)
        model = model.eval().requires_grad_(False)
        teacher = Teacher(model, device, str(dtype).removeprefix("torch."), dataset.tokenizer.vocabulary_size)
        _check_answers(files, teacher, telling_rows(dataset))
    return teacher


def _check_sizes(files: TeacherFiles, config: PretrainedConfig, dataset: PreparedDataset, longest: int) -> None:
    """Refuse a teacher of fewer tokens, or of a context that is shorter than the longest piece."""
    about, wanted = config.get_text_config(), dataset.tokenizer.vocabulary_size
    if about.vocab_size < wanted:
        raise UserError(files.field, files.name, f"must have the dataset's {wanted} tokens, not {about.vocab_size}")
    context = getattr(about, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise UserError(files.field, files.name, f"must read {longest} tokens at once, but its context is {context}")


def _check_answers(files: TeacherFiles, teacher: Teacher, rows: Batch) -> None:
    """Refuse a teacher that is not causal, and find out how it takes packed rows, if at all."""
    longest = max((rows.input_ids[row, columns] for row, columns in pieces_of(rows)), key=len)
    logits_TV = teacher.alone(longest)
    if logits_TV.shape[-1] < teacher.vocabulary_size:
        allowed = f"must have the dataset's {teacher.vocabulary_size} tokens, not {logits_TV.shape[-1]}"
        raise UserError(files.field, files.name, allowed)
    if not logits_TV.amax(-1).isfinite().all():
        raise UserError(files.field, files.name, "must give finite logits (it gives nan or inf)")
    if not is_causal(teacher, longest):
        allowed = "must be causal: a later token changes what it says about earlier positions, as in BERT"
        raise UserError(files.field, files.name, allowed)
    for layered in sorted({teacher.layered, False}, reverse=True):
        teacher.layered, teacher.packed = layered, True
        if packs_right(teacher, rows):
            return
    teacher.packed = False


def _load_model(files: TeacherFiles, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, "trust_remote_code": False}
    if getattr(teacher_config(files), "quantization_config", None) is not None:
        options["device_map"] = {"": device}
    with refused_in_one_line(files), quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(files.folder, attn_implementation="sdpa", **options)
        except (ValueError, ImportError):  # the architecture has no such attention
            model, info = AutoModelForCausalLM.from_pretrained(files.folder, **options)
    if missing := sorted(info["missing_keys"]):
        allowed = f"must have all of its weights; {len(missing)} are missing, such as {missing[0]}"
        raise UserError(files.field, files.name, allowed)
    return model
