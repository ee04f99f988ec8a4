"""Writes text with a model, and reads from the model's state how sure it was of each token.

Tokens are drawn as transformers' generate draws them: equal logits and seeds give equal tokens. The loop is our own,
because importing transformers takes longer than writing a short text. The module also reads the confidence |c| and the
uncertainty phase/pi * ln V of the state that each token was drawn from.

Legend: T positions of prompt and written text, W written tokens, D real width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from indraquantum.config import SamplingSettings, TestSettings
from indraquantum.data.prompt import format_alpaca, prompt_ids
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.inference.token_texts import token_texts
from indraquantum.model.readout import wrapped_phase
from indraquantum.model.shape import ModelShape

GREEDY_BELOW = 1e-6  # at lower temperatures the likeliest token is certain, and logits / temperature may overflow


class Writer(Protocol):
    """A model that can write text: an InferenceModel or an IndraQuantumPhase2."""

    config: ModelShape

    @property
    def device(self) -> torch.device:
        """The device of its weights."""

    def lifted(self) -> AbstractContextManager[None]:
        """Inside, the table is lifted once."""

    def lift_table(self) -> Tensor:
        """Return the lifted table (V, D)."""

    def hidden_states(self, input_ids_BT: Tensor) -> Tensor:
        """Return the states (B, T, D)."""

    def logits(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D) against the table."""

    def amplitude(self, states: Tensor) -> Tensor:
        """Return the complex readouts (...) of `states` (..., D)."""

    def next_logits(self, ids_BT: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Return the logits (B, V) of the token after `ids_BT`, and what to pass together with that token."""


@dataclass(frozen=True)
class TokenState:
    """One written token and the state it was drawn from."""

    text: str  # "" for control tokens, and for all but the last token of a character of several tokens
    probability: float  # of this token in the model's full distribution, at temperature 1
    confidence: float  # |c|, aligned in training to the teacher's largest probability
    # phase / pi * ln V, aligned to the teacher's entropy, which is from 0 to ln V. The phase may leave that range: the
    # value is in (-0.5, 1.5] * ln V. `indra test` shows the nearest value in the range.
    uncertainty_nats: float


@dataclass(frozen=True)
class GeneratedText:
    """What the model wrote after the prompt."""

    text: str  # without the prompt and without control tokens
    tokens: list[TokenState]  # one per written token, only with show_state
    ids: tuple[int, ...] = ()  # of prompt and text, with control tokens


def uncertainty_nats(phase: Tensor, vocabulary_size: int) -> Tensor:
    """Convert a phase (...) in radians to an entropy (...) in nats, the inverse of the target pi * H / ln V.

    The result is in (-0.5, 1.5] * ln V.
    """
    return wrapped_phase(phase) / math.pi * math.log(vocabulary_size)


def prompt_text(settings: TestSettings) -> str:
    """Return the text to continue: the prompt, or the instruction in the Alpaca prompt.

    Raises:
        UserError: neither or both are given.
    """
    if (settings.prompt is None) == (settings.instruction is None):
        raise UserError("--prompt", settings.prompt, "give either --prompt TEXT or --instruction TEXT")
    if settings.input is not None and settings.instruction is None:
        raise UserError("--input", settings.input, "must be given together with --instruction TEXT")
    if settings.instruction is not None:
        return format_alpaca(settings.instruction, settings.input or "")
    return settings.prompt or ""


def generate_text(model: Writer, tokenizer: TextTokenizer, settings: TestSettings, prompt: str) -> GeneratedText:
    """Continue `prompt`.

    Args:
        model: the model, in evaluation mode, on any device.
        tokenizer: the tokenizer that it was trained with.
        settings: how to choose tokens, how many, the seed, and whether to read the states. Equal seeds give equal
            text. torch's global random state does not change.
        prompt: the text to continue.

    Raises:
        UserError: prompt and text together are too long for the model, the prompt is not UTF-8, or it is empty and the
            tokenizer has no BOS token.
    """
    ids = prompt_ids("--prompt", prompt, tokenizer)
    _check_length(len(ids), model.config.max_position_embeddings, settings)
    ids_1T = torch.tensor([ids], device=model.device)
    # Tokens are drawn from the global generator, which inside the fork is used by nothing else.
    devices = [] if model.device.type == "cpu" else [model.device]  # the CPU's state is always restored
    with torch.random.fork_rng(devices, device_type=model.device.type):
        torch.manual_seed(settings.seed)
        ids_1T = _continued(model, ids_1T, settings, tokenizer.eos_id)
    texts = token_texts(tokenizer, ids, ids_1T[0, len(ids) :].tolist())
    tokens = _read_states(model, ids_1T, texts) if settings.show_state else []
    return GeneratedText("".join(texts), tokens, tuple(ids_1T[0].tolist()))


def _check_length(prompt_tokens: int, limit: int, settings: TestSettings) -> None:
    room = limit - prompt_tokens
    if room < 1:
        field = "--prompt" if settings.instruction is None else "--instruction"
        raise UserError(field, f"{prompt_tokens} tokens", f"must be at most {limit - 1} tokens for this model")
    if settings.max_new_tokens > room:
        allowed = f"must be at most {room}: the prompt takes {prompt_tokens} of the model's {limit} tokens"
        raise UserError("--max-new-tokens", settings.max_new_tokens, allowed)


@torch.no_grad()
def _continued(model: Writer, ids_1T: Tensor, settings: TestSettings, eos_id: int) -> Tensor:
    """`ids_1T` (1, T) with what the model writes after it, EOS included where it comes to that."""
    read_1T, past = ids_1T, None
    with model.lifted():
        for _ in range(settings.max_new_tokens):
            logits_1V, past = model.next_logits(read_1T, past)
            read_1T = choose(logits_1V.float(), settings)
            ids_1T = torch.cat([ids_1T, read_1T], dim=1)
            if read_1T.item() == eos_id:
                break
    return ids_1T


def choose(logits_1V: Tensor, settings: SamplingSettings) -> Tensor:
    """Return the next token (1, 1): the likeliest, or drawn from what temperature, top-k and top-p leave in turn.

    It is drawn from torch's global generator.
    """
    if settings.temperature < GREEDY_BELOW:
        return logits_1V.argmax(dim=-1, keepdim=True)
    logits_1V = logits_1V / settings.temperature
    if settings.top_k:
        least = logits_1V.topk(min(settings.top_k, logits_1V.shape[-1])).values[:, -1:]
        logits_1V = logits_1V.masked_fill(logits_1V < least, -math.inf)
    if settings.top_p < 1:
        # Of the others, top-k has left nothing. To sort all would take as long as all the rest of a step, but of equal
        # logits, which top-k leaves all, only the sort tells which are cut first.
        if int((logits_1V > -math.inf).sum()) == settings.top_k < logits_1V.shape[-1]:
            sorted_1V, order_1V = (found.flip(-1) for found in logits_1V.topk(settings.top_k))
        else:
            sorted_1V, order_1V = logits_1V.sort(stable=True)
        unlikely_1V = sorted_1V.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        unlikely_1V[:, -1] = False  # the likeliest always stays
        left_out_1V = torch.zeros_like(logits_1V, dtype=torch.bool).scatter_(1, order_1V, unlikely_1V)
        logits_1V = logits_1V.masked_fill(left_out_1V, -math.inf)
    return torch.multinomial(logits_1V.softmax(dim=-1), num_samples=1)


@torch.no_grad()
def _read_states(model: Writer, ids_1T: Tensor, texts: Sequence[str]) -> list[TokenState]:
    """Read the states that the last len(texts) tokens were drawn from, in one pass over the whole text."""
    states_1TD = model.hidden_states(ids_1T[:, :-1])
    logits_WV = model.logits(states_1TD[0, -len(texts) :], model.lift_table())
    amplitude_W = model.amplitude(states_1TD)[0, -len(texts) :]
    probability_W = logits_WV.float().softmax(-1).gather(-1, ids_1T[0, -len(texts) :, None])[:, 0]
    uncertainty_W = uncertainty_nats(amplitude_W.angle(), model.config.vocab_size)
    rows = zip(texts, probability_W.tolist(), amplitude_W.abs().tolist(), uncertainty_W.tolist(), strict=True)
    return [TokenState(*row) for row in rows]
