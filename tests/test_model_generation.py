"""Generation and its cache: the model's own full pass, token by token, is the reference."""

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from small_model import NARROW, V, make, make_with_twin, tokens


def test_cached_logits_equal_uncached():
    model, ids = make(), tokens(2, 11)
    whole = model(ids).logits
    start = model(ids[:, :4], use_cache=True)
    middle = model(ids[:, 4:5], past_key_values=start.past_key_values, use_cache=True)
    end = model(ids[:, 5:], past_key_values=middle.past_key_values, use_cache=True, logits_to_keep=2)
    torch.testing.assert_close(start.logits, whole[:, :4])
    torch.testing.assert_close(middle.logits, whole[:, 4:5])
    torch.testing.assert_close(end.logits, whole[:, -2:])


def generate(model, ids, **options):
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **options})


def letters():
    """A tokenizer that spells each token as one character."""
    backend = Tokenizer(WordLevel({chr(97 + number): number for number in range(V)}, unk_token="a"))
    backend.pre_tokenizer, backend.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sharpened(**options):
    # An untrained tied model repeats its last token; stronger layers and a larger scale make it write varied
    # text whose likeliest tokens are clear of rounding.
    model = make(**options)
    with torch.no_grad():
        model.head.scale_1.mul_(30)
        for layer in model.backbone.layers:
            layer.self_attn.o_proj.weight.mul_(15)
            layer.mlp.down_proj.weight.mul_(15)
    return model


@pytest.mark.parametrize("options", [{}, {"projector": "none"}, {"ends": "shared"}, NARROW])
def test_greedy_generation_equals_argmax_step_by_step(options):
    model, ids = sharpened(**options), tokens(2, 5)
    expected = ids
    for _ in range(9):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert len(set(expected[:, 5:].flatten().tolist())) > 2
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)


def test_sampling_is_the_same_with_and_without_cache():
    model, ids = make(), tokens(3, 5)
    written = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        written.append(generate(model, ids, do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*written)
    assert len(set(written[0][:, 5:].flatten().tolist())) > 9


def test_left_padding_changes_nothing():
    model, ids = sharpened(), tokens(1, 5)
    padded = F.pad(ids, (4, 0), value=0)
    both = torch.cat([padded, tokens(1, 9, seed=8)])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    assert torch.equal(generate(model, both, attention_mask=mask)[0, 4:], generate(model, ids)[0])


def test_generation_follows_a_change_of_weights(monkeypatch):
    model, ids = sharpened(), tokens(1, 5)
    before = generate(model, ids)
    lifts = []
    lift = model.lift_table
    monkeypatch.setattr(model, "lift_table", lambda: (lifts.append(1), lift())[1])
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight.flip(0))
    after = generate(model, ids)
    assert len(lifts) == 1  # once a call, not once a token
    assert not torch.equal(after, before)
    with torch.no_grad():
        assert torch.equal(after[:, 5:6], model(ids).logits[:, -1:].argmax(-1))
        model.embedding.weight.neg_()
        logits = model(ids).logits  # no table of the last call stays behind
    torch.testing.assert_close(logits, model(ids).logits)


def test_a_lifted_table_is_not_used_where_gradients_are_wanted():
    model, ids = make(), tokens(1, 5)
    with model.lifted():
        model(ids).logits.sum().backward()
    # Through the head alone every row of the table gets a gradient.
    assert model.embedding.weight.grad.abs().sum(-1).gt(0).all()


def test_beams_find_the_likeliest_text_of_all():
    model, ids = make(), tokens(2, 5)
    with torch.no_grad():
        model.head.scale_1.mul_(4)
        for layer in model.backbone.layers:
            layer.mlp.down_proj.weight.mul_(15)
        pairs_N2 = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        expected = []
        for row in ids:
            log_p = model(torch.cat([row.expand(len(pairs_N2), -1), pairs_N2], dim=1)).logits[:, 4:6].log_softmax(-1)
            expected.append(pairs_N2[log_p.gather(-1, pairs_N2[..., None]).sum((1, 2)).argmax()])
    # With as many beams as tokens no beginning is given up.
    written = generate(model, ids, num_beams=V, max_new_tokens=2, length_penalty=0.0)[:, 5:]
    assert torch.equal(written, torch.stack(expected))
    assert not torch.equal(written, generate(model, ids, max_new_tokens=2)[:, 5:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        {"cache_implementation": "static"},
        {"num_beams": 2, "do_sample": True, "top_k": 20},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
        {"prompt_lookup_num_tokens": 3},
        {"output_scores": True, "return_dict_in_generate": True, "output_hidden_states": True},
    ],
)
def test_generation_equals_llamas(options):
    model, llama = make_with_twin()
    ids = torch.cat([F.pad(tokens(1, 5), (4, 0), value=0), tokens(1, 9, seed=8)])
    ids = ids[1:] if "prompt_lookup_num_tokens" in options else ids
    mask = (ids != 0).long()
    written = []
    for each in (model, llama):
        torch.manual_seed(7)
        written.append(generate(each, ids, attention_mask=mask, **options))
    if "return_dict_in_generate" not in options:
        assert torch.equal(*written)
        return
    ours, theirs = written
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_other_ways_to_write_the_greedy_text(options):
    model, ids = sharpened(), tokens(1, 5)
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


def test_assisted_decoding_writes_what_the_model_alone_writes(monkeypatch):
    model, ids = sharpened(), tokens(1, 5)
    alone = generate(model, ids)
    for assistant in (sharpened(num_hidden_layers=1, d_model=10), sharpened()):
        lifts, lift = [], assistant.lift_table
        monkeypatch.setattr(assistant, "lift_table", lambda lifts=lifts, lift=lift: (lifts.append(1), lift())[1])
        assert torch.equal(generate(model, ids, assistant_model=assistant), alone)
        assert len(lifts) == 1  # not once a round of guesses


@pytest.mark.parametrize("options", [{}, {"ends": "shared"}, NARROW])
def test_generation_from_embeddings(options):
    model, ids = sharpened(**options), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    written = model.generate(
        inputs_embeds=embeddings, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(written, generate(model, ids)[:, 5:])


def test_generation_in_bfloat16_goes_as_the_uncached_loop():
    model, ids = sharpened(), tokens(2, 5)
    exact = generate(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    logits_BTV = torch.stack(rounded.logits, dim=1).float()
    with torch.no_grad():
        reference = model(rounded.sequences[:, :-1], use_cache=False).logits[:, 4:]
    scale = reference.std()
    assert (logits_BTV - reference).abs().mean() < 0.1 * scale
    assert torch.equal(rounded.sequences[:, 5:7], exact[:, 5:7])


def test_a_misspelt_option_of_generate_is_refused():
    with pytest.raises(ValueError, match="attention_msk"):
        generate(make(), tokens(1, 5), attention_msk=torch.ones(1, 5))


def test_stop_strings_end_a_text_as_with_llama():
    model, twin = make_with_twin()
    ids = tokens(2, 5)
    tokenizer = letters()
    text = tokenizer.decode(generate(model, ids)[0, 7:9])
    for beams in (1, 2):
        how = {"stop_strings": [text], "tokenizer": tokenizer, "num_beams": beams}
        written = generate(model, ids[:1], **how)
        assert torch.equal(written, generate(twin, ids[:1], **how))
        assert beams > 1 or written.shape[1] < 5 + 9
