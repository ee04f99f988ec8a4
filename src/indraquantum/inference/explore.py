"""Looks inside the state of a model: what it read at each token, which tokens interfered, and its vocabulary as a map.

The figures of a token are those of `indra test --show-state`. A token's logit is a sum over the complex dimensions j:

    logit_v = scale * sum_j M_vj |psi_j| cos(P_vj - arg psi_j) + bias_v

The explorer shows the largest terms of this sum: a positive term is constructive interference, a negative one is
destructive. With Born's rule a logit is no such sum, so there are none.

Legend: T positions, W tokens shown, V vocabulary, D real width, D/2 complex width, K alternatives.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indraquantum.config import TestSettings
from indraquantum.data.split import Batch, Split
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.inference.generate import TokenState, generate_text, prompt_text, uncertainty_nats
from indraquantum.inference.load import Loaded
from indraquantum.inference.token_texts import token_texts
from indraquantum.inference.write import state_figures
from indraquantum.model.readout import wrapped_phase
from indraquantum.teacher.signals import SignalStore

ALTERNATIVES = 5
TERMS = 8
BOTH = frozenset({"magnitude", "phase"})


@dataclass(frozen=True)
class _States:
    """The states that W tokens were drawn from, and what the model predicted there."""

    psi_WD: Tensor
    logits_WV: Tensor
    ids: list[int]  # of these tokens
    table_VD: Tensor  # the state of each token of the vocabulary


def _states(loaded: Loaded, psi_WD: Tensor, ids: list[int]) -> _States:
    table_VD = loaded.inference_model.lift_table()
    return _States(psi_WD, loaded.inference_model.logits(psi_WD, table_VD).float(), ids, table_VD)


def written(loaded: Loaded, settings: TestSettings) -> dict[str, Any]:
    """Continue a prompt and return the written tokens with all that the explorer shows of them.

    Raises:
        UserError: an option is wrong, or prompt and text together are too long for the model.
    """
    prompt, model = prompt_text(settings), loaded.inference_model
    settings = settings.model_copy(update={"show_state": True})
    generated = generate_text(model, loaded.tokenizer, settings, prompt)
    count = len(generated.tokens)
    with torch.no_grad():
        ids_1T = torch.tensor([generated.ids], device=model.device)
        psi_WD = model.hidden_states(ids_1T[:, :-1])[0, -count:]
        tokens = _tokens(loaded, _states(loaded, psi_WD, list(generated.ids[-count:])), generated.tokens)
    return {"prompt": prompt, "text": generated.text, **_about(loaded), "tokens": tokens}


def held_out_row(loaded: Loaded, split: Split, row: int, signals: SignalStore | None) -> dict[str, Any]:
    """Return the tokens of a held-out row as the model reads them, with the teacher's figures where there are any.

    Raises:
        UserError: there is no such row, or it has nothing to predict.
    """
    if not 0 <= row < split.num_rows:
        raise UserError("row", row, f"must be from 0 to {split.num_rows - 1}")
    model, batch = loaded.inference_model, split.batch(np.array([row]))
    places = np.flatnonzero(batch.labelled[0])
    if not len(places):
        raise UserError("row", row, "must hold something to predict")
    with torch.no_grad():
        ids, positions, segments = (torch.from_numpy(part).to(model.device) for part in batch[:1] + batch[2:4])
        psi_WD = model.hidden_states(ids, positions, segments)[0, torch.from_numpy(places)]
        states = _states(loaded, psi_WD, batch.labels[0, places].tolist())
        tokens = _tokens(loaded, states, _read(loaded, states, _label_texts(loaded.tokenizer, batch, places)))
    teacher = _teacher(signals, batch.index[0, places])
    return {**_about(loaded), "tokens": [token | found for token, found in zip(tokens, teacher, strict=True)]}


def _read(loaded: Loaded, states: _States, texts: list[str]) -> list[TokenState]:
    """Read the states of tokens that the model did not write, whose texts are given."""
    amplitude_W = loaded.inference_model.amplitude(states.psi_WD)
    probability_W = states.logits_WV.softmax(-1).gather(-1, torch.tensor(states.ids)[:, None].to(states.psi_WD.device))
    nats_W = uncertainty_nats(amplitude_W.angle(), loaded.inference_model.config.vocab_size)
    rows = zip(texts, probability_W[:, 0].tolist(), amplitude_W.abs().tolist(), nats_W.tolist(), strict=True)
    return [TokenState(*row) for row in rows]


def _label_texts(tokenizer: TextTokenizer, batch: Batch, places: np.ndarray) -> list[str]:
    """Return the text of the label at each of these places of a row, as a share of the text of its document."""
    texts: list[str] = []
    for _, group in itertools.groupby(places.tolist(), key=lambda place: batch.segments[0, place]):
        there = list(group)
        texts += token_texts(tokenizer, batch.input_ids[0, there[:1]].tolist(), batch.labels[0, there].tolist())
    return texts


def _teacher(signals: SignalStore | None, index_W: np.ndarray) -> list[dict[str, float | None]]:
    """Return the teacher's entropy and confidence at each position; None where there are no signals."""
    found = None if signals is None else signals.batch("validation", index_W)
    if found is None or found.entropy_N is None:
        return [{"teacher_entropy": None, "teacher_confidence": None} for _ in index_W]
    rows = zip((found.ids_NK >= 0).any(-1).tolist(), found.entropy_N.tolist(), found.confidence_N.tolist(), strict=True)
    return [
        {"teacher_entropy": entropy if there else None, "teacher_confidence": confidence if there else None}
        for there, entropy, confidence in rows
    ]


def _about(loaded: Loaded) -> dict[str, Any]:
    shape = loaded.inference_model.config
    return {
        "aligned": sorted(BOTH if loaded.aligned is None else loaded.aligned),
        "highest_nats": math.log(shape.vocab_size),
        "dimensions": shape.hidden_size // 2,
        "vocabulary": shape.vocab_size,
        "head": shape.head,
    }


def _tokens(loaded: Loaded, states: _States, read: list[TokenState]) -> list[dict[str, Any]]:
    about = _about(loaded)
    aligned, phases = set(about["aligned"]), wrapped_phase(loaded.inference_model.amplitude(states.psi_WD).angle())
    entropy_W = torch.distributions.Categorical(logits=states.logits_WV).entropy()
    return [
        {
            "id": token_id,
            "text": token.text,
            "probability": token.probability,
            "confidence": token.confidence if "magnitude" in aligned else None,
            "phase": phase if "phase" in aligned else None,
            "uncertainty": token.uncertainty_nats if "phase" in aligned else None,
            "entropy": entropy,  # of the model's own prediction, nats
            "shown": state_figures(token, aligned, about["highest_nats"]),
            "alternatives": _alternatives(loaded, states, place),
        }
        for place, (token_id, token, phase, entropy) in enumerate(
            zip(states.ids, read, phases.tolist(), entropy_W.tolist(), strict=True)
        )
    ]


def _alternatives(loaded: Loaded, states: _States, place: int) -> list[dict[str, Any]]:
    """Return the likeliest tokens at one position, and the chosen one, with the largest terms of their logits."""
    logits_V = states.logits_WV[place]
    chosen, best = states.ids[place], logits_V.topk(min(ALTERNATIVES, len(logits_V))).indices.tolist()
    ids = best if chosen in best else [*best, chosen]
    probabilities = logits_V.softmax(-1)[ids].tolist()
    is_sum = loaded.inference_model.config.head == "interference"
    found = [
        {
            "id": token,
            "text": token_name(loaded.tokenizer, token),
            "chosen": token == chosen,
            "probability": probability,
            "logit": logits_V[token].item(),
            **(_terms(loaded, states.psi_WD[place], states.table_VD[token], token) if is_sum else {}),
        }
        for token, probability in zip(ids, probabilities, strict=True)
    ]
    return sorted(found, key=lambda one: -one["probability"])


def _terms(loaded: Loaded, psi_D: Tensor, row_D: Tensor, token: int) -> dict[str, Any]:
    """Return the largest terms of a token's logit, the sum of the others, and the bias."""
    model = loaded.inference_model
    state, psi = (torch.complex(*vector.float().chunk(2)) for vector in (row_D, psi_D))
    magnitude, amplitude, angle = state.abs(), psi.abs(), wrapped_phase(state.angle() - psi.angle())
    terms = model.scale * magnitude * amplitude * angle.cos()
    largest = terms.abs().topk(min(TERMS, len(terms))).indices.tolist()
    return {
        "terms": [
            {"dimension": at, "magnitude": magnitude[at].item(), "amplitude": amplitude[at].item(),
             "angle": angle[at].item(), "term": terms[at].item()}
            for at in largest
        ],
        "others": (terms.sum() - terms[largest].sum()).item(),
        "bias": 0.0 if model.bias_V is None else model.bias_V[token].item(),
    }  # fmt: skip


def token_name(tokenizer: TextTokenizer, token: int) -> str:
    """Return a token as text: with its leading blank, which decoders drop, and control tokens by their names."""
    name = tokenizer.backend.id_to_token(token) or f"[{token}]"
    if name.startswith("▁"):
        return name.replace("▁", " ")
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else name


@torch.no_grad()
def vocabulary(loaded: Loaded, dimension: int | None) -> dict[str, Any]:
    """Return the magnitude and the phase of each token's state in the head, and which readouts were aligned.

    Args:
        loaded: the model.
        dimension: the complex dimension j: its modulus and angle. None reads each state as the readout reads a state.

    Raises:
        UserError: there is no such dimension.
    """
    model = loaded.inference_model
    table_VD = model.lift_table()
    width = table_VD.shape[1] // 2
    if dimension is None:
        values_V = model.amplitude(table_VD)
    elif 0 <= dimension < width:
        values_V = torch.complex(table_VD[:, dimension].float(), table_VD[:, width + dimension].float())
    else:
        raise UserError("dimension", dimension, f"must be from 0 to {width - 1}")
    magnitude, phase = values_V.abs().tolist(), wrapped_phase(values_V.angle()).tolist()
    return {
        "aligned": _about(loaded)["aligned"],
        "magnitude": [float(f"{m:.5g}") for m in magnitude],
        "phase": [round(p, 4) for p in phase],
    }
