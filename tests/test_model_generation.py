"""Generation and its cache: the model's own full pass, token by token, is the reference."""

import pytest
import torch
import torch.nn.functional as F

from small_model import make, tokens


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


@pytest.mark.parametrize("options", [{}, {"projector": "none"}, {"ends": "separate"}])
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
