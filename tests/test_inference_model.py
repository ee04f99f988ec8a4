"""The model in plain torch is IndraQuantumPhase2 on transformers' Llama: the same numbers, the same text, quickly."""

import pytest
import torch
from tokenizers import Tokenizer, models

from indraquantum.config import TestSettings
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.inference.generate import choose, generate_text
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from small_model import NARROW, WIDE, make, tokens

VARIANTS = [
    {},
    {"ends": "shared", "residual": True, "magnitude": "softplus"},
    {"projector": "none"},
    {"projector": "mlp", "head": "born", "readout": "mean"},
    {"projector": "phase-only", "readout_references": 3, "num_attention_heads": 5, "rope_theta": 100.0},
    {"projector": "gated", "num_attention_heads": 4, "num_key_value_heads": 2},
    NARROW,
    {**NARROW, "residual": True, "residual_head": "turned"},
    {"projector": "linear", "head": "born", **WIDE},
]
SEGMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 3, [0] * 7 + [-1] * 4])
POSITIONS = torch.tensor([[*range(5), *range(3), *range(3)], [*range(7), *range(4)]])


def both(**variant):
    """IndraQuantumPhase2, and the model in plain torch, made of what a checkpoint would keep of it."""
    full = make(**variant)
    return full, InferenceModel(ModelShape.from_values(full.config.to_dict()), full.state_dict())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_states_logits_and_readouts_are_those_of_the_model_on_transformers_layers(variant):
    full, plain = both(**variant)
    ids = tokens(2, 11)
    for rows in ({}, {"position_ids_BT": POSITIONS}, {"position_ids_BT": POSITIONS, "segment_ids_BT": SEGMENTS}):
        states = plain.hidden_states(ids, **rows)
        torch.testing.assert_close(states, full.hidden_states(ids, **rows), rtol=0, atol=1e-6)
    output, table_VD = full(ids), plain.lift_table()
    states = plain.hidden_states(ids)
    torch.testing.assert_close(plain.logits(states, table_VD), output.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.amplitude(states).abs(), output.magnitude, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.bias_V, full.bias_V)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_each_step_of_a_text_gives_the_logits_of_the_whole_text(variant):
    full, plain = both(**variant)
    ids = tokens(1, 9)
    whole = full(ids).logits
    for model in (plain, full):
        past = None
        with model.lifted():
            for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
                logits_1V, past = model.next_logits(ids[:, start:end], past)
                torch.testing.assert_close(logits_1V, whole[:, end - 1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 0}, {"top_p": 1.0}, {"temperature": 3.0, "top_k": 7}, {"temperature": 0.0}]
)
def test_text_is_what_transformers_generate_writes(settings):
    chosen = TestSettings(max_new_tokens=12, **settings)
    full, plain = both()
    vocabulary = {f"t{number}": number for number in range(full.config.vocab_size)}
    tokenizer = TextTokenizer(Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), 1, 2)
    sampling = {"do_sample": False}
    if chosen.temperature:
        sampling = {"do_sample": True, "temperature": chosen.temperature, "top_k": chosen.top_k, "top_p": chosen.top_p}
    ids = torch.tensor([[1, 7]])
    for seed in range(3):
        torch.manual_seed(seed)
        theirs = full.generate(ids, max_new_tokens=12, eos_token_id=2, pad_token_id=2, **sampling)[0, 2:].tolist()
        text = tokenizer.decode([1, 7, *theirs])
        for model in (plain, full):
            written = generate_text(model, tokenizer, chosen.model_copy(update={"seed": seed}), "t7")
            assert "t7" + written.text == text


def test_top_p_keeps_the_likeliest_up_to_the_mass_and_top_k_that_many():
    logits_1V = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = {
        name: {choose(logits_1V, TestSettings(temperature=1.0, **chosen)).item() for _ in range(60)}
        for name, chosen in {"p": {"top_p": 0.7, "top_k": 0}, "k": {"top_p": 1.0, "top_k": 3}}.items()
    }
    assert drawn == {"p": {0, 1}, "k": {0, 1, 2}}


def test_weights_of_another_shape_and_impossible_shapes_are_refused():
    full, _ = both()
    with pytest.raises(RuntimeError, match=r"size mismatch for embedding\.weight"):
        InferenceModel(ModelShape.from_values(full.config.to_dict() | {"vocab_size": 54}), full.state_dict())
    for wrong in ({"projector": "classical"}, {"d_model": "wide"}, {"num_attention_heads": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ModelShape.from_values(full.config.to_dict() | wrong)


def test_loading_draws_nothing_and_shares_the_weights():
    full, _ = both()
    weights, before = full.state_dict(), torch.random.get_rng_state()
    plain = InferenceModel(ModelShape.from_values(full.config.to_dict()), weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert plain.embedding.weight.data_ptr() == weights["embedding.weight"].data_ptr()
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert not plain.training
