"""Writes text with a model, and reads from the model's own state how sure it was of each token.

The words are chosen by transformers' generate; what this project adds is the reading: confidence |c| and
uncertainty phase/pi * ln V of the state that each token was drawn from.

Legend: T positions of prompt and written text, W written tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from indraquantum.config import TestSettings
from indraquantum.data.records import is_text
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.model.readout import wrapped_phase

GREEDY_BELOW = 1e-6  # a temperature at which the likeliest token is certain, and logits / temperature may overflow
UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not yet a whole character


@dataclass(frozen=True)
class TokenState:
    """One written token and the state it was drawn from."""

    text: str  # "" for control tokens, and for all but the last token of a character made of several
    probability: float  # of this token in the model's whole distribution, at temperature 1
    confidence: float  # |c|, aligned in training to the teacher's largest probability
    uncertainty_nats: float  # phase / pi * ln V, aligned to the teacher's entropy; noise around 0 may be negative


@dataclass(frozen=True)
class GeneratedText:
    """What the model wrote after the prompt."""

    text: str  # without the prompt and without control tokens
    tokens: list[TokenState]  # one per written token, only with show_state


def uncertainty_nats(phase: Tensor, vocabulary_size: int) -> Tensor:
    """Read a phase (...) in radians as an entropy (...) in nats, the inverse of the target pi * H / ln V.

    The result is in (-0.5, 1.5] * ln V.
    """
    return wrapped_phase(phase) / math.pi * math.log(vocabulary_size)


def generate_text(
    model: IndraQuantumPhase2, tokenizer: TextTokenizer, settings: TestSettings, prompt: str
) -> GeneratedText:
    """Continue `prompt`.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the one it was trained with.
        settings: how to choose tokens, how many, the seed, and whether to read the states. Equal seeds give
            equal text; torch's global random state is left as it was.
        prompt: the text to continue.

    Raises:
        UserError: prompt and text together are longer than the model takes, the prompt is no UTF-8, or it is empty and
            the tokenizer has no BOS to begin with.
    """
    if not is_text(prompt):
        raise UserError("--prompt", ascii(prompt), "must be UTF-8 text")
    prompt_ids = tokenizer.encode_prompt(prompt)
    if not prompt_ids:
        raise UserError("--prompt", ascii(prompt), "must not be empty: the model's documents begin with no BOS")
    _check_length(len(prompt_ids), model.config.max_position_embeddings, settings)
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    # transformers draws from the global generator; inside the fork that is ours alone.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        ids_1T = model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=_generation(tokenizer, settings)
        )
    texts = _token_texts(tokenizer, prompt_ids, ids_1T[0, len(prompt_ids) :].tolist())
    tokens = _read_states(model, ids_1T, texts) if settings.show_state else []
    return GeneratedText("".join(texts), tokens)


def _check_length(prompt_tokens: int, limit: int, settings: TestSettings) -> None:
    room = limit - prompt_tokens
    if room < 1:
        field = "--prompt" if settings.instruction is None else "--instruction"
        raise UserError(field, f"{prompt_tokens} tokens", f"must be at most {limit - 1} tokens for this model")
    if settings.max_new_tokens > room:
        allowed = f"must be at most {room}: the prompt has {prompt_tokens} of the {limit} tokens that the model takes"
        raise UserError("--max-new-tokens", settings.max_new_tokens, allowed)


def _generation(tokenizer: TextTokenizer, settings: TestSettings) -> GenerationConfig:
    common = {
        "max_new_tokens": settings.max_new_tokens,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
    if settings.temperature < GREEDY_BELOW:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        **common,
    )


def _token_texts(tokenizer: TextTokenizer, prompt_ids: Sequence[int], written_ids: Sequence[int]) -> list[str]:
    """Return each written token's share of the text.

    A token alone does not tell its text: decoders drop a leading space, and a character may take several
    tokens. So the text so far is decoded at each token, and what is new is its share.
    """
    texts, shown = [], tokenizer.decode(prompt_ids)
    for count in range(1, len(written_ids) + 1):
        whole = tokenizer.decode([*prompt_ids, *written_ids[:count]])
        if whole.endswith(UNFINISHED) and count < len(written_ids):
            texts.append("")
            continue
        texts.append(whole[len(shown) :])
        shown = whole
    return texts


def _read_states(model: IndraQuantumPhase2, ids_1T: Tensor, texts: Sequence[str]) -> list[TokenState]:
    """Read the states that the last len(texts) tokens were drawn from, in one pass over the whole text."""
    with torch.no_grad():
        output = model(ids_1T[:, :-1], logits_to_keep=len(texts))
    written_W1 = ids_1T[0, -len(texts) :, None]
    probability_W = output.logits[0].float().softmax(-1).gather(-1, written_W1)[:, 0]
    confidence_W = output.magnitude[0, -len(texts) :]
    uncertainty_W = uncertainty_nats(output.phase[0, -len(texts) :], model.config.vocab_size)
    rows = zip(texts, probability_W.tolist(), confidence_W.tolist(), uncertainty_W.tolist(), strict=True)
    return [TokenState(*row) for row in rows]
