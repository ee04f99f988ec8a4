"""Loads a trained model and its tokenizer from a checkpoint, or from a folder that `indra export` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from indraquantum.config import TestSettings
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import NOT_ITS_SUM, damaged_file, read_json
from indraquantum.inference.generate import GeneratedText, generate_text, prompt_text
from indraquantum.memory import memory_needed
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from indraquantum.strategy import Weights
from indraquantum.training.checkpoint import STUDENT_TYPE, Checkpoint, load_checkpoint, require_student

if TYPE_CHECKING:
    from indraquantum.model.modeling import IndraQuantumPhase2

WhichWeights = Literal["auto", "ema", "last"]
ALIGNED = "aligned_readouts"  # where an exported folder's config.json tells it


@dataclass(frozen=True)
class Loaded:
    """A trained model with its tokenizer, in evaluation mode. `load` returns it; `generate` and `evaluate` take it.

    Attributes:
        inference_model: the model in plain torch, which loads and writes quickly.
        tokenizer: the tokenizer that it was trained with.
        model_config: the values of its `IndraQuantumConfig`.
        aligned: the readouts, of `magnitude` and `phase`, that training aligned with a teacher; None where the files
            do not tell. A readout that was never aligned says nothing.
        path: the checkpoint or folder it was loaded from.
        trained_on: the SHA-256 of the content of each dataset of its run, without those of an earlier run that it
            started from; none where the files do not tell.
    """

    inference_model: InferenceModel
    tokenizer: TextTokenizer
    model_config: Mapping[str, Any]
    aligned: frozenset[str] | None
    path: Path
    trained_on: frozenset[str] = frozenset()

    @cached_property
    def model(self) -> IndraQuantumPhase2:
        """The model for transformers, with the same tensors. Importing transformers takes seconds."""
        from indraquantum.model.configuration import IndraQuantumConfig
        from indraquantum.model.modeling import IndraQuantumPhase2

        model = IndraQuantumPhase2(IndraQuantumConfig.from_dict(dict(self.model_config)))
        model.load_state_dict(self.inference_model.state_dict(), assign=True)
        return model.to(self.inference_model.device).eval()

    def generate(self, prompt: str | None = None, **options: Any) -> GeneratedText:
        """Continue `prompt`, or answer `instruction`.

        Args:
            prompt: the text to continue.
            options: those of `TestSettings`, such as `instruction`, `max_new_tokens`, `temperature` and `seed`. The
                states of the tokens are read unless `show_state=False` leaves them out.

        Raises:
            InvalidInput: an option is wrong, or prompt and text together are longer than the model takes.
        """
        settings = TestSettings(**{"prompt": prompt, "show_state": True, **options})
        return generate_text(self.inference_model, self.tokenizer, settings, prompt_text(settings))


def load(path: Path, device: torch.device, weights: WhichWeights = "auto") -> Loaded:
    """Load the model and the tokenizer at `path`.

    Args:
        path: a checkpoint, or an exported folder.
        device: where to put the model.
        weights: for a checkpoint, the moving average or the last weights; auto takes the average if there is one.

    Raises:
        UserError: `path` is neither, is damaged, or has no moving average although `weights` asks for it.
    """
    if path.is_dir():
        return _load_folder(path, device, weights)
    return loaded_from(path, load_checkpoint("CHECKPOINT", path), device, weights)


def _load_folder(path: Path, device: torch.device, weights: WhichWeights) -> Loaded:
    """Load a folder that `indra export` or `save_pretrained` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if weights != "auto":
        raise UserError("--weights", weights, "must be auto, because an exported folder holds one set of weights")
    about = read_json("CHECKPOINT", path / "config.json") if (path / "config.json").is_file() else None
    if not isinstance(about, dict) or about.get("model_type") != STUDENT_TYPE:
        raise UserError(
            "CHECKPOINT", path, "must be a checkpoint, or a folder that `indra export` wrote as transformers"
        )
    files = sorted(path.glob("*.safetensors"))
    if (damaged := damaged_file(path, ["config.json", *(file.name for file in files)])) is not None:
        raise UserError("CHECKPOINT", path / damaged, NOT_ITS_SUM)
    tokenizer = load_tokenizer("CHECKPOINT", str(path))
    try:
        # save_pretrained may have written 16 bits. The model computes in float32.
        state = {name: _in_float32(value) for file in files for name, value in load_file(file).items()}
        model = InferenceModel(ModelShape.from_values(about), state)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError("CHECKPOINT", path, f"must hold the weights of a model ({_in_one_line(error)})") from None
    aligned = about.get(ALIGNED)
    aligned = None if aligned is None else frozenset(aligned)
    return Loaded(_moved(model, path, device), tokenizer, about, aligned, path)


def load_model(
    path: Path, device: torch.device, weights: WhichWeights = "auto"
) -> tuple[IndraQuantumPhase2, TextTokenizer]:
    """Do what `load` does, and return the model for transformers and the tokenizer."""
    loaded = load(path, device, weights)
    return loaded.model, loaded.tokenizer


def loaded_from(path: Path, checkpoint: Checkpoint, device: torch.device, weights: WhichWeights) -> Loaded:
    """Do what `load` does with a checkpoint that was already read; `path` is for messages."""
    if weights == "ema" and not checkpoint.average:
        raise UserError("--weights", weights, "must be last or auto, because the checkpoint has no moving average")
    require_student("CHECKPOINT", path, checkpoint)
    state = checkpoint.model if weights == "last" else checkpoint.model | checkpoint.average
    try:
        model = InferenceModel(ModelShape.from_values(checkpoint.model_config), state)
    except RuntimeError as error:
        raise UserError(
            "CHECKPOINT", path, f"must hold weights that fit its own settings ({_mismatch(error)})"
        ) from None
    except ValueError as error:
        raise UserError("CHECKPOINT", path, f"must hold the settings of a model ({_in_one_line(error)})") from None
    aligned = frozenset(aligned_readouts(checkpoint))
    tokenizer = _tokenizer_of(path, checkpoint)
    stages = checkpoint.settings.get("stages") or {}
    data = {stated.get("data") for stated in (checkpoint.settings, *stages.values())} - {None}
    return Loaded(_moved(model, path, device), tokenizer, checkpoint.model_config, aligned, path, frozenset(data))


def _in_float32(weight: torch.Tensor) -> torch.Tensor:
    return weight.float() if weight.is_floating_point() else weight


def _moved(model: InferenceModel, path: Path, device: torch.device) -> InferenceModel:
    """Return the model on the device; `path` is for the message.

    Raises:
        OutOfMemory: the device has no room for it.
    """
    allowed = f"must have free memory for the model in {path}; end other programs, or give --device cpu"
    with memory_needed("--device", device, allowed):
        return model.to(device)


def _tokenizer_of(path: Path, checkpoint: Checkpoint) -> TextTokenizer:
    """Return the tokenizer that the checkpoint at `path` holds.

    Raises:
        UserError: it holds none, or one that can't be read.
    """
    parts = checkpoint.tokenizer
    try:
        return TextTokenizer.from_json(parts["json"], parts["bos_id"], parts["eos_id"])
    except Exception as error:  # the tokenizers library raises Exception itself
        allowed = f"must hold the tokenizer that it was trained with ({type(error).__name__}: {_in_one_line(error)})"
        raise UserError("CHECKPOINT", path, allowed) from None


def aligned_readouts(checkpoint: Checkpoint) -> set[str]:
    """Return the readouts (phase, magnitude) that the run aligned with a teacher in a stage that it has begun."""
    aligned, first = set(), 0
    for stage in checkpoint.settings["stages"].values():
        if checkpoint.step > first:
            weights = Weights.model_validate(stage["weights"])
            aligned |= {name for name in ("phase", "magnitude") if getattr(weights, name).highest > 0}
        first += stage["steps"]
    return aligned


def _mismatch(error: RuntimeError) -> str:
    """Return the first mismatch of torch's list, which begins in its second line."""
    return "".join(str(error).splitlines()[1:2]).strip() or _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
