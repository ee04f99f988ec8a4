"""Writing text: the model's own argmax as reference, the seed, the limits, and the states read beside it."""

import math
from itertools import product

import pytest
import torch

from byte_tokenizer import BOS, EOS, byte_tokenizer
from indraquantum.config import TestSettings
from indraquantum.errors import UserError
from indraquantum.inference.generate import choose, generate_text, uncertainty_nats
from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2

LIMIT = 47


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    config = IndraQuantumConfig(
        vocab_size=258,
        d_model=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=31,
        max_position_embeddings=LIMIT,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model = IndraQuantumPhase2(config).eval()
    with torch.no_grad():
        model.head.scale_1.mul_(5)
        for layer in model.backbone.layers:  # an untrained tied model would only repeat its last token
            layer.mlp.down_proj.weight.mul_(15)
        model.head.bias_V[[BOS, EOS]] = -100.0
    return model


def options(**values):
    return TestSettings(**{"max_new_tokens": 13, "temperature": 0.0, **values})


def test_greedy_text_equals_argmax_step_by_step(model, tokenizer):
    ids = tokenizer.encode_prompt("Tell me")
    for _ in range(13):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    generated = generate_text(model, tokenizer, options(), "Tell me")
    assert generated.text == tokenizer.decode(ids)[len("Tell me") :]
    assert generated.tokens == []


def test_a_seed_decides_the_text_and_the_global_state_stays(model, tokenizer):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    texts = [generate_text(model, tokenizer, options(temperature=1.0, seed=seed), "a").text for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(model, tokenizer, narrow):
    greedy = generate_text(model, tokenizer, options(), "abc").text
    assert generate_text(model, tokenizer, options(**{"temperature": 3.0, "top_k": 0, **narrow}), "abc").text == greedy


def test_states_are_those_each_token_was_drawn_from(model, tokenizer):
    prompt_ids = tokenizer.encode_prompt("xyz")
    generated = generate_text(model, tokenizer, options(temperature=1.0, show_state=True, top_k=0), "xyz")
    assert len(generated.tokens) == 13
    assert "".join(token.text for token in generated.tokens) == generated.text
    plain = generate_text(model, tokenizer, options(temperature=1.0, top_k=0), "xyz")
    assert plain.text == generated.text
    first = generated.tokens[0]
    output = model(torch.tensor([prompt_ids]))
    assert first.confidence == pytest.approx(output.magnitude[0, -1].item(), rel=1e-5)
    phase = output.phase[0, -1].item()
    wrapped = phase + 2 * math.pi if phase <= -math.pi / 2 else phase
    assert first.uncertainty_nats == pytest.approx(wrapped / math.pi * math.log(258), rel=1e-4)
    probabilities = output.logits[0, -1].softmax(-1)
    assert (probabilities - first.probability).abs().min() < 1e-6


def test_phase_reads_as_entropy():
    phase = torch.tensor([0.0, math.pi / 2, math.pi, -math.pi / 4, -3 * math.pi / 4, -math.pi / 2 + 0.001])
    expected = torch.tensor([0.0, 0.5, 1.0, -0.25, 1.25, -0.5 + 0.001 / math.pi]) * math.log(31)
    torch.testing.assert_close(uncertainty_nats(phase, 31), expected, rtol=1e-5, atol=1e-5)
    # the inverse of the target pi * H / ln V, on the circle that a complex angle lies on
    entropy = torch.linspace(0, math.log(31), 17)
    turned = torch.polar(torch.ones(17), math.pi * entropy / math.log(31)).angle()
    torch.testing.assert_close(uncertainty_nats(turned, 31), entropy, rtol=1e-5, atol=1e-5)


def test_text_ends_at_the_control_token_and_characters_stay_whole(model, tokenizer, monkeypatch):
    wanted = " zwölf €"
    written = tokenizer.encode_prompt(wanted)[1:]
    prompt_ids = tokenizer.encode_prompt("Nein:")
    script = {tuple(prompt_ids + written[:n]): token for n, token in enumerate([*written, EOS])}

    def next_logits(ids, past):
        read = (*(past or ()), *ids[0].tolist())
        return torch.nn.functional.one_hot(torch.tensor([script[read]]), 258).float(), read

    monkeypatch.setattr(model, "next_logits", next_logits)
    generated = generate_text(model, tokenizer, options(show_state=True), "Nein:")
    assert generated.text == wanted
    assert [token.text for token in generated.tokens] == [*" zw", "", "ö", *"lf ", "", "", "€", ""]


def test_a_model_that_is_sure_to_stop_writes_nothing(model, tokenizer):
    twin = IndraQuantumPhase2(model.config).eval()
    with torch.no_grad():
        twin.head.bias_V[EOS] = 1000.0
    generated = generate_text(twin, tokenizer, options(show_state=True), "The end.")
    assert generated.text == ""
    assert [round(token.probability, 6) for token in generated.tokens] == [1.0]


def test_the_longest_text_that_fits_is_written(model, tokenizer):
    assert len(generate_text(model, tokenizer, options(max_new_tokens=LIMIT - 4, show_state=True), "abc").tokens) == 43


@pytest.mark.parametrize(
    ("values", "prompt", "message"),
    [
        ({"max_new_tokens": LIMIT - 3}, "abc", "--max-new-tokens: got 44; must be at most 43: the prompt takes 4 of"),
        ({}, "a" * LIMIT, f"--prompt: got {LIMIT + 1} tokens; must be at most {LIMIT - 1} tokens"),
        ({}, "a\udcff", r"--prompt: got 'a\\udcff'; must be UTF-8 text"),
        ({"instruction": "b"}, "a" * LIMIT, f"--instruction: got {LIMIT + 1} tokens; must be at most {LIMIT - 1}"),
    ],
)
def test_text_beyond_the_models_length_names_the_option(model, tokenizer, values, prompt, message):
    with pytest.raises(UserError, match=message):
        generate_text(model, tokenizer, options(**values), prompt)


@pytest.mark.parametrize(("top_k", "top_p", "rounded"), list(product([0, 2, 5, 40], [0.1, 0.4, 0.9], [True, False])))
def test_a_choice_is_among_as_many_as_with_transformers(monkeypatch, top_k, top_p, rounded):
    """Of equal logits, transformers may leave others, because its sort is not stable, but as many."""
    drawn_from = []
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, num_samples: drawn_from.append(probs) or probs.argmax(-1)[None]
    )
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    filters = [TemperatureLogitsWarper(0.8), *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)]
    settings = TestSettings(temperature=0.8, top_k=top_k, top_p=top_p)
    for seed in range(20):
        logits_1V = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 2
        logits_1V = logits_1V.round() if rounded else logits_1V
        left_1V = logits_1V
        for reduce in filters:
            left_1V = reduce(None, left_1V)
        choose(logits_1V, settings)
        expected = left_1V.softmax(-1)
        torch.testing.assert_close(drawn_from[-1].sort().values, expected.sort().values)
        assert rounded or torch.equal(drawn_from[-1], expected)
