"""Writes text with a trained checkpoint: the command `indra test`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from indraquantum.config import TestSettings
from indraquantum.data.prompt import format_alpaca
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.evaluation.generate import GeneratedText, generate_text
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.training.checkpoint import load_checkpoint


def load_model(
    path: Path, device: torch.device, weights: Literal["auto", "ema", "last"] = "auto"
) -> tuple[IndraQuantumPhase2, TextTokenizer]:
    """The model and the tokenizer of a checkpoint, ready to write.

    Args:
        path: the checkpoint.
        device: where to put the model.
        weights: the moving average or the last weights; auto takes the average where there is one.

    Raises:
        UserError: `path` is no whole checkpoint, its weights don't fit its own configuration, or it has no average.
    """
    checkpoint = load_checkpoint("CHECKPOINT", path)
    if weights == "ema" and not checkpoint.average:
        raise UserError("--weights", weights, "must be last or auto: the checkpoint keeps no average")
    model = IndraQuantumPhase2(IndraQuantumConfig.from_dict(checkpoint.model_config))
    try:
        model.load_state_dict(checkpoint.model if weights == "last" else checkpoint.model | checkpoint.average)
    except RuntimeError as error:
        raise UserError("CHECKPOINT", path, f"must hold weights of its own shape ({_mismatch(error)})") from None
    tokenizer = checkpoint.tokenizer
    return model.to(device).eval(), TextTokenizer.from_json(tokenizer["json"], tokenizer["bos_id"], tokenizer["eos_id"])


def prompt_text(settings: TestSettings) -> str:
    """The text to continue: the prompt as it is, or an instruction in the Alpaca prompt.

    Raises:
        UserError: neither or both are given.
    """
    if (settings.prompt is None) == (settings.instruction is None):
        raise UserError("--prompt", settings.prompt, "give either --prompt TEXT or --instruction TEXT")
    if settings.input is not None and settings.instruction is None:
        raise UserError("--input", settings.input, "belongs to --instruction TEXT")
    if settings.prompt is not None:
        return settings.prompt
    return format_alpaca(settings.instruction, settings.input or "")


def write_text(path: Path, settings: TestSettings) -> GeneratedText:
    """Load the checkpoint at `path`, continue the prompt and print the result."""
    text = prompt_text(settings)
    model, tokenizer = load_model(path, choose_device(settings), settings.weights)
    generated = generate_text(model, tokenizer, settings, text)
    print(text + generated.text)
    if settings.show_state:
        print_states(generated)
    return generated


def print_states(generated: GeneratedText) -> None:
    """A table with a line per written token: its probability and the model's own reading of its state."""
    from rich.console import Console
    from rich.table import Table

    table = Table("token", "probability", "confidence |c|", "uncertainty (nats)", title="state at each written token")
    for token in generated.tokens:
        table.add_row(
            repr(token.text), f"{token.probability:.3f}", f"{token.confidence:.3f}", f"{token.uncertainty_nats:.2f}"
        )
    Console().print(table)


def _mismatch(error: RuntimeError) -> str:
    return str(error).splitlines()[1].strip()
