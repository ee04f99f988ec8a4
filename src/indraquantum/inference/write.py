"""Writes text with a trained checkpoint: the command `indra test`."""

from __future__ import annotations

import math
from pathlib import Path

from indraquantum.config import TestSettings
from indraquantum.device import choose_device
from indraquantum.inference.generate import GeneratedText, TokenState, generate_text, prompt_text
from indraquantum.inference.load import load


def continued(path: Path, settings: TestSettings) -> GeneratedText:
    """Load the checkpoint or the exported folder at `path`, and return what it writes after the prompt."""
    loaded = load(path, choose_device(settings), settings.weights)
    return generate_text(loaded.inference_model, loaded.tokenizer, settings, prompt_text(settings))


def write_text(path: Path, settings: TestSettings) -> GeneratedText:
    """Load the checkpoint or the exported folder at `path`, continue the prompt and print the result."""
    text = prompt_text(settings)
    loaded = load(path, choose_device(settings), settings.weights)
    generated = generate_text(loaded.inference_model, loaded.tokenizer, settings, text)
    print(text + generated.text)
    if settings.show_state:
        aligned = {"magnitude", "phase"} if loaded.aligned is None else set(loaded.aligned)
        print_states(generated, aligned, math.log(loaded.inference_model.config.vocab_size))
    return generated


def state_figures(token: TokenState, aligned: set[str], highest_nats: float) -> dict[str, str]:
    """Return the figures of a token as text. See `print_states`."""
    figures = {"probability": f"{token.probability:.3f}"}
    if "magnitude" in aligned:
        figures["confidence |c|"] = f"{token.confidence:.3f}"
    if "phase" in aligned:
        figures["uncertainty (nats)"] = f"{min(max(0.0, token.uncertainty_nats), highest_nats):.2f}"
    return figures


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
    from rich.text import Text

    columns = state_figures(TokenState("", 0.0, 0.0, 0.0), aligned, highest_nats)
    table = Table("token", *columns, title="state at each token of the text")
    for token in generated.tokens:
        table.add_row(Text(repr(token.text)), *state_figures(token, aligned, highest_nats).values())
    Console().print(table)
    if "phase" in aligned:
        print(f"Uncertainty lies between 0 and ln V = {highest_nats:.2f} nats.")
    if missing := [name for name in ("magnitude", "phase") if name not in aligned]:
        meant = " or ".join({"magnitude": "confidence", "phase": "uncertainty"}[name] for name in missing)
        readouts = " or the ".join(missing)
        print(f"This run never aligned the {readouts} readout with a teacher, so no {meant} is shown.")
