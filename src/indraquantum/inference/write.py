"""Writes text with a trained checkpoint: the command `indra test`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from indraquantum.config import TestSettings
from indraquantum.data.prompt import format_alpaca
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.inference.generate import GeneratedText, generate_text
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from indraquantum.strategy import Weights
from indraquantum.training.checkpoint import Checkpoint, load_checkpoint, require_student

if TYPE_CHECKING:
    from indraquantum.model.modeling import IndraQuantumPhase2

AnyModel = TypeVar("AnyModel")


def load_model(
    path: Path, device: torch.device, weights: Literal["auto", "ema", "last"] = "auto"
) -> tuple[IndraQuantumPhase2, TextTokenizer]:
    """Load the model and the tokenizer of a checkpoint; the model works with transformers' classes.

    Args:
        path: the checkpoint.
        device: where to put the model.
        weights: the moving average or the last weights; auto takes the average if there is one.

    Raises:
        UserError: `path` is not a valid checkpoint, its weights don't fit its configuration, or it has no average.
    """
    from indraquantum.model.configuration import IndraQuantumConfig
    from indraquantum.model.modeling import IndraQuantumPhase2

    def build(state: dict[str, torch.Tensor]) -> IndraQuantumPhase2:
        model = IndraQuantumPhase2(IndraQuantumConfig.from_dict(checkpoint.model_config))
        model.load_state_dict(state)
        return model.to(device).eval()

    checkpoint = load_checkpoint("CHECKPOINT", path)
    return _built(path, checkpoint, weights, build)


def load_inference_model(
    path: Path, device: torch.device, weights: Literal["auto", "ema", "last"] = "auto"
) -> tuple[InferenceModel, TextTokenizer]:
    """Do what `load_model` does, quicker, with a model that only writes and evaluates text."""
    return inference_model_of(path, load_checkpoint("CHECKPOINT", path), device, weights)


def inference_model_of(
    path: Path, checkpoint: Checkpoint, device: torch.device, weights: Literal["auto", "ema", "last"] = "auto"
) -> tuple[InferenceModel, TextTokenizer]:
    """Do what `load_inference_model` does with a checkpoint that was already read; `path` is for the message.

    Raises:
        UserError: its weights don't fit its configuration, or it has no average.
    """

    def build(state: dict[str, torch.Tensor]) -> InferenceModel:
        return InferenceModel(ModelShape.from_values(checkpoint.model_config), state).to(device)

    return _built(path, checkpoint, weights, build)


def _built(
    path: Path,
    checkpoint: Checkpoint,
    weights: Literal["auto", "ema", "last"],
    build: Callable[[dict[str, torch.Tensor]], AnyModel],
) -> tuple[AnyModel, TextTokenizer]:
    """Return what `build` makes from the weights, and the tokenizer."""
    if weights == "ema" and not checkpoint.average:
        raise UserError("--weights", weights, "must be last or auto, because the checkpoint has no moving average")
    require_student("CHECKPOINT", path, checkpoint)
    try:
        model = build(checkpoint.model if weights == "last" else checkpoint.model | checkpoint.average)
    except RuntimeError as error:
        raise UserError(
            "CHECKPOINT", path, f"must hold weights that fit its own settings ({_mismatch(error)})"
        ) from None
    except ValueError as error:
        raise UserError("CHECKPOINT", path, f"must hold the settings of a model ({_in_one_line(error)})") from None
    tokenizer = checkpoint.tokenizer
    return model, TextTokenizer.from_json(tokenizer["json"], tokenizer["bos_id"], tokenizer["eos_id"])


def prompt_text(settings: TestSettings) -> str:
    """Return the text to continue: the prompt, or the instruction in the Alpaca prompt.

    Raises:
        UserError: neither or both are given.
    """
    if (settings.prompt is None) == (settings.instruction is None):
        raise UserError("--prompt", settings.prompt, "give either --prompt TEXT or --instruction TEXT")
    if settings.input is not None and settings.instruction is None:
        raise UserError("--input", settings.input, "must be given together with --instruction TEXT")
    if settings.prompt is not None:
        return settings.prompt
    return format_alpaca(settings.instruction, settings.input or "")


def write_text(path: Path, settings: TestSettings) -> GeneratedText:
    """Load the checkpoint at `path`, continue the prompt and print the result."""
    text = prompt_text(settings)
    checkpoint = load_checkpoint("CHECKPOINT", path)
    model, tokenizer = inference_model_of(path, checkpoint, choose_device(settings), settings.weights)
    generated = generate_text(model, tokenizer, settings, text)
    print(text + generated.text)
    if settings.show_state:
        print_states(generated, aligned_readouts(checkpoint), math.log(model.config.vocab_size))
    return generated


def aligned_readouts(checkpoint: Checkpoint) -> set[str]:
    """Which readouts, phase and magnitude, the run aligned with a teacher in a stage that it has begun."""
    aligned, first = set(), 0
    for stage in checkpoint.settings["stages"].values():
        if checkpoint.step > first:
            weights = Weights.model_validate(stage["weights"])
            aligned |= {name for name in ("phase", "magnitude") if getattr(weights, name).highest > 0}
        first += stage["steps"]
    return aligned


def print_states(generated: GeneratedText, aligned: set[str], highest_nats: float) -> None:
    """A table with a line per written token: its probability and the model's own reading of its state.

    Args:
        generated: the tokens.
        aligned: the readouts, phase and magnitude, that were aligned with a teacher; another says nothing.
        highest_nats: the largest uncertainty there is, ln V. A phase outside of what an entropy can be reads as the
            nearer end.
    """
    from rich.console import Console
    from rich.table import Table

    columns = {"probability": lambda token: f"{token.probability:.3f}"}
    if "magnitude" in aligned:
        columns["confidence |c|"] = lambda token: f"{token.confidence:.3f}"
    if "phase" in aligned:
        columns["uncertainty (nats)"] = lambda token: f"{min(max(0.0, token.uncertainty_nats), highest_nats):.2f}"
    table = Table("token", *columns, title="state at each token of the text")
    for token in generated.tokens:
        table.add_row(repr(token.text), *(show(token) for show in columns.values()))
    Console().print(table)
    if "phase" in aligned:
        print(f"Uncertainty lies between 0 and ln V = {highest_nats:.2f} nats.")
    if missing := [name for name in ("magnitude", "phase") if name not in aligned]:
        meant = " or ".join({"magnitude": "confidence", "phase": "uncertainty"}[name] for name in missing)
        readouts = " or the ".join(missing)
        print(f"This run never aligned the {readouts} readout with a teacher, so no {meant} is shown.")


def _mismatch(error: RuntimeError) -> str:
    return str(error).splitlines()[1].strip()


def _in_one_line(error: ValueError) -> str:
    return " ".join(str(error).split())[:200]
